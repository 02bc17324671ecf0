"""What a replica is told to serve. Apart from the engine, so that a flow need not import torch."""

from pydantic import BaseModel, ConfigDict, Field


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
    max_waiting: int = Field(256, ge=1, description="sequences that may wait for a slot")
    threads: int = Field(1, ge=1, description="CPU cores the engine may use")

    def same_model(self, other: "ModelSpec") -> bool:
        """Equal but for the mark of the request."""
        return self == other.model_copy(update={"request": self.request})
