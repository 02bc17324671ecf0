"""What a replica is told to serve. Apart from the engine, so that a flow need not import torch."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class ModelSpec(BaseModel):
    """Which model is to be served, and how: the deployment's user_config."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(description="the model's name in the API")
    version: str
    system_fingerprint: str = Field(description="names these very weights; replies carry it")
    store: str = Field(description="artifact store: a directory or an s3:// URI")
    artifact: str = Field(description="stage/fingerprint of the model in the store")
    lineage: dict[str, str] = Field(default_factory=dict)
    scores: dict[str, float] = Field(default_factory=dict)
    title: str = Field("", description="what the chat page invites to ask about")
    corpus: str = Field("", description="what the model was trained on, in words")
    examples: tuple[str, ...] = Field((), description="questions the chat page offers")
    request: str = Field("", description="marks one deploy; a new mark tries a failed model again")
    slots: int = Field(32, ge=1, description="sequences generated at the same time")
    max_waiting: int = Field(32, ge=1, description="sequences that may wait for a slot")
    threads: int = Field(1, ge=1, description="CPU cores the engine may use")
    weights: Literal["float32", "bfloat16", "int8"] = Field(
        "float32", description="how the engine keeps the weights; less is faster and less exact"
    )
    speculate: int = Field(0, ge=0, le=16, description="tokens guessed ahead; answers are the same")
    deterministic: bool = Field(False, description="bitwise the same answers in any batch")
    database: str | None = Field(
        None,
        description="where API keys are kept; 'environment': in $GRISTMILL_DATABASE of the replica",
    )
    aliases: tuple[str, ...] = Field((), description="the registry's names for this version")
    share: float = Field(1.0, ge=0, le=1, description="of the requests for the bare name")
    beside: tuple["ModelSpec", ...] = Field((), description="versions served at the same time")

    @model_validator(mode="after")
    def _one_level(self) -> "ModelSpec":
        if any(other.beside for other in self.beside):
            raise ValueError("a version beside another cannot have versions beside it")
        names = [one.system_fingerprint for one in (self, *self.beside)]
        if len(names) != len(set(names)):
            raise ValueError(f"a version is named twice: {', '.join(names)}")
        return self

    @property
    def everything(self) -> tuple["ModelSpec", ...]:
        """This version and those beside it."""
        return (self, *self.beside)

    @property
    def names(self) -> tuple[str, ...]:
        """What a request may call this version, apart from the bare name it may share."""
        return tuple(f"{self.name}@{which}" for which in (self.version, *self.aliases))

    def same_model(self, other: "ModelSpec") -> bool:
        """Whether an engine made for one can go on for the other: equal but for what routes to
        it.
        """
        routing = {"request": "", "database": None, "aliases": (), "share": 1.0, "beside": ()}
        return self.model_copy(update=routing) == other.model_copy(update=routing)
