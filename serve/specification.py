"""What a replica is told to serve. Apart from the engine, so that a flow need not import torch."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_CHOICES = 128  # answers one request may ask for: prompts × n


class EngineOptions(BaseModel):
    """How the engine of a served model works; none of it changes which model it is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["gristmill", "vllm"] = Field(
        "gristmill", description="Ours, or vLLM through ray.serve.llm, which needs GPUs."
    )
    device: Literal["cpu", "cuda"] = Field(
        "cpu", description="cuda: a GPU for each replica; answers are steps of CUDA graphs."
    )
    weights: Literal["float32", "bfloat16", "int8"] = Field(
        "float32", description="How the weights are kept; less is faster and less exact."
    )
    slots: int = Field(32, ge=1, le=1024, description="Sequences generated at the same time.")
    max_waiting: int = Field(
        32, ge=1, le=100_000, description="Sequences that may wait for a slot; more get 429."
    )
    threads: int = Field(1, ge=1, le=1024, description="CPU cores the engine may use.")
    speculate: int = Field(
        0, ge=0, le=16, description="Tokens guessed ahead from the text; answers are the same."
    )
    deterministic: bool = Field(
        False, description="Bitwise the same answers in any batch, at a batch's cost."
    )
    compiled: bool = Field(
        True,
        description="On a CPU, make a program of a single answer's step once there were many, "
        "unless deterministic; needs a C++ compiler, without which answers go on as they are.",
    )

    @model_validator(mode="after")
    def _go_together(self) -> "EngineOptions":
        if self.kind == "vllm":
            own = {
                "device cuda": self.device == "cuda",
                "weights int8": self.weights == "int8",
                f"threads {self.threads}": self.threads > 1,
                "deterministic": self.deterministic,
                "compiled false": not self.compiled,
            }
            for name in (name for name, given in own.items() if given):
                raise ValueError(f"{name} is of our own engine; leave it out with vllm")
        if self.deterministic and self.speculate:
            raise ValueError(
                f"deterministic answers come one token at a time: set speculate {self.speculate} "
                "to 0, or leave deterministic out"
            )
        return self


class ModelSpec(EngineOptions):
    """Which model is to be served, and how: the deployment's user_config."""

    name: str = Field(description="the model's name in the API")
    version: str
    system_fingerprint: str = Field(description="names these very weights; replies carry it")
    store: str = Field(description="artifact store: a directory or an s3:// URI")
    artifact: str = Field(description="stage/fingerprint of the model in the store")
    draft: str | None = Field(
        None, description="stage/fingerprint of the model that guesses `speculate` tokens ahead"
    )
    lineage: dict[str, str] = Field(default_factory=dict)
    scores: dict[str, float] = Field(default_factory=dict)
    title: str = Field("", description="what the chat page invites to ask about")
    corpus: str = Field("", description="what the model was trained on, in words")
    examples: tuple[str, ...] = Field((), description="questions the chat page offers")
    request: str = Field("", description="marks one deploy; a new mark tries a failed model again")
    database: str | None = Field(
        None,
        description="where API keys are kept; 'environment': in $GRISTMILL_DATABASE of the replica",
    )
    aliases: tuple[str, ...] = Field((), description="the registry's names for this version")
    share: float = Field(1.0, ge=0, le=1, description="of the requests for the bare name")
    copies: int = Field(1, ge=1, description="replicas there may be of this one")
    beside: tuple["ModelSpec", ...] = Field((), description="versions served at the same time")

    @model_validator(mode="after")
    def _one_level(self) -> "ModelSpec":
        if self.kind != "gristmill":
            raise ValueError(f"engine {self.kind} is not of this replica")
        if any(other.beside for other in self.beside):
            raise ValueError("a version beside another cannot have versions beside it")
        names = [one.system_fingerprint for one in (self, *self.beside)]
        if len(names) != len(set(names)):
            raise ValueError(f"a version is named twice: {', '.join(names)}")
        return self

    def served_state(self) -> dict[str, Any]:
        """How everything here is told from another wish: by `system_fingerprint`, the share, the
        aliases and the engine of each version.
        """
        each = {one.system_fingerprint: one for one in self.everything}
        return {
            "shares": {name: one.share for name, one in each.items()},
            "aliases": {name: list(one.aliases) for name, one in each.items()},
            "engines": {name: one.engine_state() for name, one in each.items()},
        }

    def engine_state(self) -> dict[str, str | int | bool | None]:
        """The engine's options and who drafts for it."""
        return {name: getattr(self, name) for name in (*EngineOptions.model_fields, "draft")}

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
        routing: dict[str, Any] = {"request": "", "database": None, "aliases": (), "share": 1.0}
        routing |= {"copies": 1, "beside": ()}
        return self.model_copy(update=routing) == other.model_copy(update=routing)
