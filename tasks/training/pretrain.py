"""The pretraining stage: a base model from token shards."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, Self

from pydantic import ConfigDict, Field, field_validator, model_validator

from model.config import ConfigError, ModelConfig
from model.flops import count_parameters
from model.width import width_ratio
from tasks.registry.tracking import log_metrics, tracked
from tasks.runtime.errors import UserError
from tasks.runtime.fingerprint import place
from tasks.runtime.manifest import Manifest, Scalar
from tasks.runtime.settings import Settings
from tasks.runtime.stage import Outcome, Workspace, stage
from tasks.tokenizer.stored import load_tokenizer
from tasks.training.foreseen import errors
from tasks.training.job import TrainingJob
from tasks.training.launch import launch, require_tokenizer_of, require_whole
from tasks.training.options import ModelOptions, ScheduleOptions, TrainingConfig, shown_first
from tasks.training.shapes import SERVED
from tasks.training.start_from import (
    checkpoint_digest,
    checkpoint_directory,
    checkpoint_shape,
    left_out_of,
    require_tokenizer,
    require_weights,
)


class PretrainConfig(TrainingConfig):
    """How the base model is trained."""

    model_config = ConfigDict(json_schema_extra=shown_first("tokens", "sequence", "model"))

    tokens: int = Field(1_600_000, ge=0)
    """Tokens to train on, counted again on every pass over the corpus; 0: none, and the checkpoint
    of start_from becomes the base model as it is."""
    sequence: int = Field(256, ge=2)
    """Tokens of one training sequence."""
    document_masking: bool = False
    """Keep documents that share a sequence from seeing each other."""
    source_weights: dict[str, float] = Field(default_factory=dict)
    """Weight of each source of the corpus, by name (seeds: what was crawled), which gives its share
    of every stretch of the run; 0: none of it, nor of its held-out documents. Empty: as much as
    there is of each."""
    weights: Literal["last", "best"] = "last"
    """Which weights become the model: the last, or those that held-out documents liked best."""
    mask_share: float = Field(0.15, gt=0, lt=1)
    """Share of the tokens that is hidden and guessed; of the family bert only."""
    start_from: str = place("")
    """Directory of a Hugging Face checkpoint to go on from, below a source root; its shape counts
    then instead of the model's below. The run's tokenizer must be that checkpoint's: give the same
    directory as tokenizer.import_from. Rows of its vocabulary are moved to our ids; those of its
    own special tokens are left out, and the chat marks begin with the mean of its rows."""
    start_digest: str = ""
    """What lies in that directory; filled in by itself."""
    model: ModelOptions = ModelOptions()
    # Fine-tuning goes on with the documents, so the rate need not fall far before it.
    schedule: ScheduleOptions = ScheduleOptions(decay=0.1)

    @field_validator("source_weights")
    @classmethod
    def positive(cls, value: dict[str, float]) -> dict[str, float]:
        for name, weight in value.items():
            if not 0 <= weight < float("inf"):
                raise ValueError(
                    f"weight {weight} of source {name!r} must be a number of at least 0, which "
                    f"leaves it out"
                )
        if value and not any(value.values()):
            raise ValueError("source_weights leave every source out; give one a weight above 0")
        return value

    @model_validator(mode="after")
    def means_something(self) -> Self:
        if self.mask_share != 0.15 and self.model.causal:
            raise ValueError("mask_share is of the family bert; leave it out with any other")
        if not self.tokens and (not self.start_from or self.weights == "best"):
            raise ValueError(
                "tokens 0 takes no step: it goes with start_from, whose weights become the model, "
                "and with weights 'last'"
            )
        if self.weights == "best" and not self.heldout_sequences:
            raise ValueError(
                "weights 'best' are found by held-out documents: heldout_sequences > 0"
            )
        return self

    @model_validator(mode="after")
    def follows_the_width_and_can_be_divided(self) -> Self:
        if not self.start_from:
            shape = self.model.config(vocab_size=1)
            try:
                width_ratio(shape, self.optimizer.base_width)
                shape.require_tensor(self.run.tensor)
            except ConfigError as error:
                raise ValueError(str(error)) from error
        return self

    @model_validator(mode="after")
    def takes_its_shape_from_one_place(self) -> Self:
        """The family bert may be said of a checkpoint, too: `mask_share` is asked of it."""
        if self.start_from and self.model not in (ModelOptions(), ModelOptions(family="bert")):
            raise ValueError(
                "model is the shape of a new model, and start_from brings its own; leave model out"
            )
        return self

    @model_validator(mode="after")
    def fits_the_context(self) -> Self:
        if not self.start_from and self.sequence > self.model.context:
            raise ValueError(
                f"sequence {self.sequence} is longer than the model's context "
                f"{self.model.context}; lower one or raise the other"
            )
        return self

    def loop(self) -> dict[str, Any]:
        return super().loop() | {"keep_best": int(self.weights == "best")}

    def resolve(self) -> Self:
        resolved = super().resolve()
        if not self.start_from:
            return resolved.model_copy(update={"start_digest": ""})
        return resolved.model_copy(update={"start_digest": checkpoint_digest(self.start_from)})

    def require_served(self) -> ModelConfig:
        """The shape. Raises UserError when our engine, which evaluates and serves, lacks it."""
        shape = self.shape(vocabulary=1)
        if beyond := shape.not_generated():
            raise UserError(
                f"our engine, which evaluates and serves, runs {', '.join(SERVED)}, no model with "
                f"{', '.join(beyond)}; choose one of them as pretrain.model.family, or run the "
                f"flow pretrain, whose models other programs load"
            )
        return shape

    def shape(self, vocabulary: int) -> ModelConfig:
        """The model's shape. Raises UserError when a checkpoint to start from does not fit."""
        if not self.start_from:
            return self.model.config(vocabulary)
        shape = checkpoint_shape(self.start_from, vocabulary)
        if self.tokens and self.sequence > shape.context:
            raise UserError(
                f"pretrain.sequence {self.sequence} is longer than the context {shape.context} of "
                f"the checkpoint in {self.start_from}; lower it"
            )
        return shape


@stage("pretrain", version=2)
def pretrain(
    config: PretrainConfig, work: Workspace, *, shards: Manifest, tokenizer: Manifest
) -> Outcome:
    """Train a base model on the corpus's tokens, by Ray Train."""
    require_tokenizer_of(shards, tokenizer)
    if config.tokens and shards.counts.get("tokens", 0) <= config.sequence:
        raise UserError(
            f"the corpus has {shards.counts.get('tokens', 0)} tokens, fewer than one sequence of "
            f"{config.sequence} + 1; lower pretrain.sequence or crawl more documents"
        )
    shape = config.shape(tokenizer.counts["vocabulary"])
    start = checkpoint_directory(config.start_from) if config.start_from else None
    omitted = ""
    if start is not None:
        ours = load_tokenizer(work.store, tokenizer).data
        require_tokenizer(start, ours)
        require_weights(start, ours)
        omitted = left_out_of(start)
    inputs = {"shards": shards, "tokenizer": tokenizer}
    require_whole(work, inputs.values())
    params = {**config.model_dump(), "parameters": count_parameters(shape).total}
    told: dict[str, Scalar] = {"left_out": omitted} if omitted else {}
    with tracked("pretrain", work.fingerprint, params, inputs) as run_id:
        if start is not None and not config.tokens:
            from tasks.training.made import take_over  # brings torch

            told["mlflow_run_id"] = run_id
            return replace(take_over(start, work, tokenizer), metrics=told)
        outcome = launch(
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
                source_weights=config.source_weights,
                mask_share=config.mask_share,
                judged=config.heldout_sequences > 0,
                start_from=None if start is None else str(start),
                run=config.run,
                tracking_uri=Settings.load().mlflow,
                run_id=run_id,
            ),
            work,
        )
        wrong = errors(config, Settings.load(), shards, _reached(outcome))
        if wrong:
            log_metrics(run_id, wrong)
            told |= wrong
        return replace(outcome, metrics={**outcome.metrics, **told})


def _reached(outcome: Outcome) -> dict[str, Scalar]:
    """What a training came to, by the names of a forecast."""
    metrics, workers = outcome.metrics, outcome.world["workers"]
    seconds, megabytes = metrics["train_seconds"], metrics["peak_memory_mb"]
    assert isinstance(seconds, float) and isinstance(megabytes, float) and isinstance(workers, int)
    return {
        "loss": metrics.get("heldout_loss"),
        "seconds": seconds,
        "memory_gb": megabytes * 2**20 / 1e9,
        "device_hours": seconds * workers / 3600,
        "parameters": outcome.counts["parameters"],
        "workers": workers,
    }
