"""The pretraining stage: a base model from token shards."""

from __future__ import annotations

from typing import Self

from pydantic import ConfigDict, Field, model_validator

from model.flops import count_parameters
from tasks.registry.tracking import tracked
from tasks.runtime.errors import UserError
from tasks.runtime.manifest import Manifest
from tasks.runtime.settings import Settings
from tasks.runtime.stage import Outcome, Workspace, stage
from tasks.training.job import TrainingJob
from tasks.training.launch import launch
from tasks.training.options import ModelOptions, ScheduleOptions, TrainingConfig, shown_first


class PretrainConfig(TrainingConfig):
    """How the base model is trained."""

    model_config = ConfigDict(json_schema_extra=shown_first("tokens", "sequence", "model"))

    tokens: int = Field(1_600_000, ge=1)
    """Tokens to train on, counted again on every pass over the corpus."""
    sequence: int = Field(256, ge=2)
    """Tokens of one training sequence."""
    document_masking: bool = False
    """Keep documents that share a sequence from seeing each other."""
    model: ModelOptions = ModelOptions()
    # Fine-tuning goes on with the documents, so the rate need not fall far before it.
    schedule: ScheduleOptions = ScheduleOptions(decay=0.1)

    @model_validator(mode="after")
    def fits_the_context(self) -> Self:
        if self.sequence > self.model.context:
            raise ValueError(
                f"sequence {self.sequence} is longer than the model's context "
                f"{self.model.context}; lower one or raise the other"
            )
        return self


@stage("pretrain", version=1)
def pretrain(
    config: PretrainConfig, work: Workspace, *, shards: Manifest, tokenizer: Manifest
) -> Outcome:
    """Train a base model on the corpus's tokens, by Ray Train."""
    if shards.counts.get("tokens", 0) <= config.sequence:
        raise UserError(
            f"the corpus has {shards.counts.get('tokens', 0)} tokens, fewer than one sequence of "
            f"{config.sequence} + 1; lower pretrain.sequence or crawl more documents"
        )
    shape = config.model.config(tokenizer.counts["vocabulary"])
    inputs = {"shards": shards, "tokenizer": tokenizer}
    params = {**config.model_dump(), "parameters": count_parameters(shape).total}
    with tracked("pretrain", work.fingerprint, params, inputs) as run_id:
        return launch(
            TrainingJob(
                stage="pretrain",
                fingerprint=work.fingerprint,
                shape=shape.to_dict(),
                loop=config.loop() | {"total_tokens": config.tokens},
                sequence=config.sequence,
                document_masking=config.document_masking,
                seed=config.seed,
                tokenizer=tokenizer,
                shards=shards,
                base=None,
                pairs=None,
                run=config.run,
                tracking_uri=Settings.load().mlflow,
                run_id=run_id,
            ),
            work,
        )
