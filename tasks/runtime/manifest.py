"""What a stage made, said in one small JSON file: the only truth about what exists."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

COMPARED = "earlier_"  # names of inputs that a stage only compares its work with begin so
Scalar = int | float | str | bool | None


class FileEntry(BaseModel):
    """One file of an artifact. `name` is relative to the artifact's directory; size in bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    size: int
    sha256: str


class Erased(BaseModel):
    """What was taken out of an artifact after it was made: the one exception to immutability."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    at: str = Field(description="UTC, ISO 8601")
    tombstones: tuple[int, ...]
    documents: int = Field(description="rows that named or held what was erased")


class Manifest(BaseModel):
    """A committed artifact.

    `content` is what stages downstream see of it: the fingerprint, unless the stage knows a digest
    of what it made (a crawl does: a new epoch that found nothing new changes nothing downstream).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: str
    version: int
    fingerprint: str
    content: str
    inputs: dict[str, str] = Field(default_factory=dict, description="input name → fingerprint")
    input_contents: dict[str, str] = Field(default_factory=dict)
    config: dict[str, Any] = Field(default_factory=dict)
    counts: dict[str, int] = Field(default_factory=dict)
    rules: dict[str, int] = Field(default_factory=dict, description="rows removed, by rule")
    metrics: dict[str, Scalar] = Field(default_factory=dict)
    world: dict[str, Scalar] = Field(
        default_factory=dict, description="workers, threads, instruction set: what bits depend on"
    )
    files: tuple[FileEntry, ...] = ()
    code: str = ""
    packages: dict[str, str] = Field(default_factory=dict)
    cost: dict[str, float] = Field(default_factory=dict, description="seconds")
    created: str = Field("", description="UTC, ISO 8601")
    erased: tuple[Erased, ...] = Field(
        (), description="erasures since; `files` are as they lie there now, `counts` as made"
    )
    not_replayable: str = Field("", description="why it could not be made again, or empty")

    @property
    def made_of(self) -> list[str]:
        """Fingerprints of the inputs it was made of, not of those it was only compared with."""
        return [mark for key, mark in self.inputs.items() if not key.startswith(COMPARED)]

    def file(self, name: str) -> FileEntry:
        for entry in self.files:
            if entry.name == name:
                return entry
        raise KeyError(f"artifact {self.stage}/{self.fingerprint[:12]} has no file {name!r}")

    def names(self, prefix: str = "", suffix: str = "") -> list[str]:
        """Names of files with that prefix and suffix, sorted."""
        return sorted(
            entry.name
            for entry in self.files
            if entry.name.startswith(prefix) and entry.name.endswith(suffix)
        )
