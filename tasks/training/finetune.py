"""The fine-tuning stage: a base model learns to answer questions about its corpus."""

from __future__ import annotations

from pydantic import ConfigDict, Field

from tasks.registry.tracking import tracked
from tasks.runtime.errors import UserError
from tasks.runtime.manifest import Manifest
from tasks.runtime.progress import run_logger
from tasks.runtime.settings import Settings
from tasks.runtime.stage import Outcome, Workspace, stage
from tasks.runtime.store import Store
from tasks.training.conversations import TABLE, TOO_LONG
from tasks.training.job import PairsData, TrainingJob
from tasks.training.launch import launch, require_whole
from tasks.training.options import OptimizerOptions, ScheduleOptions, TrainingConfig, shown_first


class FinetuneConfig(TrainingConfig):
    """How the base model learns to answer. Only the answers count in the loss."""

    model_config = ConfigDict(json_schema_extra=shown_first("passes", "sequence", "replay"))

    passes: int = Field(1, ge=1)
    """Times every question is seen; the pairs stage words each fact in many questions already."""
    sequence: int = Field(256, ge=2)
    """Tokens of one packed sequence; a longer conversation is left out."""
    replay: float = Field(0.5, ge=0, le=0.95)
    """Share of steps that go on learning documents of the corpus, lest the model forget them."""
    optimizer: OptimizerOptions = OptimizerOptions(
        muon_learning_rate=0.015,
        learning_rate=3e-3,
        embedding_learning_rate=3e-3,
        weight_decay=0.15,
    )
    schedule: ScheduleOptions = ScheduleOptions(kind="linear")

    def require_context(self, context: int) -> None:
        """Raises UserError when the base model cannot read sequences this long."""
        if self.sequence > context:
            raise UserError(
                f"finetune.sequence {self.sequence} is longer than the base model's context "
                f"{context}; lower it or pretrain with a larger model.context"
            )


@stage("finetune", version=3)
def finetune(
    config: FinetuneConfig,
    work: Workspace,
    *,
    base: Manifest,
    pairs: Manifest,
    conversations: Manifest | None = None,
) -> Outcome:
    """Teach the base model to answer the corpus's questions, by Ray Train."""
    config.require_context(base.counts.get("context") or int(base.config["model"]["context"]))
    if base.config["model"].get("family") == "bert":
        raise UserError(
            "a bert model guesses masked tokens and cannot learn to answer; choose another "
            "pretrain.model.family"
        )
    store = Store.open()
    tokenizer = store.get("tokenizer", base.inputs["tokenizer"])
    shards = store.get("token-shards", base.inputs["shards"]) if config.replay else None
    inputs = {"base": base, "pairs": pairs}
    if conversations is not None:
        inputs[TABLE] = conversations
    require_whole(work, [*inputs.values(), tokenizer, *([shards] if shards else [])])
    with tracked("finetune", work.fingerprint, config.model_dump(), inputs) as run_id:
        outcome = launch(
            TrainingJob(
                stage="finetune",
                fingerprint=work.fingerprint,
                shape={},
                loop=config.loop(),
                sequence=config.sequence,
                document_masking=bool(base.config["document_masking"]),
                seed=config.seed,
                tokenizer=tokenizer,
                shards=shards,
                base=base,
                pairs=PairsData(
                    pairs=pairs,
                    passes=config.passes,
                    replay=config.replay,
                    conversations=conversations,
                ),
                judged=config.heldout_sequences > 0,
                run=config.run,
                tracking_uri=Settings.load().mlflow,
                run_id=run_id,
            ),
            work,
        )
    if left_out := outcome.counts.get(TOO_LONG):
        run_logger().warning(
            f"{left_out} of {left_out + outcome.counts[TABLE]} conversations are longer than "
            f"finetune.sequence {config.sequence} tokens and were left out"
        )
    return outcome
