"""From a stage to a finished training: start or find its Ray job, follow it, read what it left."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pyarrow as pa

from tasks.registry.models import run_page
from tasks.runtime import jobs
from tasks.runtime.errors import Unfinished, UserError
from tasks.runtime.manifest import Manifest
from tasks.runtime.plot import plot
from tasks.runtime.ray_session import leave_ray
from tasks.runtime.settings import Settings
from tasks.runtime.stage import Outcome, Report, Workspace
from tasks.training.job import CHECKPOINTS, FAILURE, JOB, PROGRESS, RESULT, TrainingJob

SHOWN = 20  # points of the curve on the run page
CURVE = pa.schema(
    [
        ("step", pa.int64()),
        ("tokens", pa.int64()),
        ("loss", pa.float64()),
        ("bits_per_byte", pa.float64()),
        ("learning_rate", pa.float64()),
        ("grad_norm", pa.float64()),
        ("tokens_per_second", pa.float64()),
        ("memory_mb", pa.float64()),
        ("mfu", pa.float64()),
        ("skipped", pa.int64()),
        ("rollbacks", pa.int64()),
        ("back_to", pa.int64()),
        ("refused", pa.list_(pa.int64())),
        ("imbalance", pa.float64()),
    ]
)


def launch(job: TrainingJob, work: Workspace) -> Outcome:
    """Train, or go on training, and describe the artifact that `work` then holds.

    Raises UserError for a mistake in config or data, JobFailed when the cluster fails too often.
    Told to end, it stops the job on its way out; what is trained stays in checkpoints.
    """
    if not work.has(RESULT):  # else the flow died between the job's end and the commit
        _follow(job, work)
    result = json.loads(work.read_bytes(RESULT))
    curve = result["curve"]
    work.write_table("curve.parquet", pa.Table.from_pylist(curve, schema=CURVE))
    last = curve[-1]
    metrics = {
        "loss": last["loss"],
        "bits_per_byte": last["bits_per_byte"],
        "tokens_per_second": round(sum(r["tokens_per_second"] for r in curve) / len(curve), 1),
        "peak_memory_mb": max(record["memory_mb"] for record in curve),
        "train_seconds": round(result["seconds"], 1),
        "mlflow_run_id": job.run_id,
    }
    told = [record["mfu"] for record in curve if record.get("mfu") is not None]
    if told:
        metrics["mfu"] = round(sum(told) / len(told), 4)
    for name in ("skipped", "rollbacks"):
        if last.get(name):
            metrics[name] = last[name]
    heldout = result.get("heldout", [])
    if heldout:
        looks = {row["step"]: row["heldout_loss"] for row in heldout}
        kept = result["counts"].get("best_step", heldout[-1]["step"])
        metrics["heldout_loss"] = looks[kept]
    words = "Held-out loss by source"
    judged = [Report(f"{job.stage}-heldout", "table", _judged(heldout), words)] if heldout else []
    return Outcome(
        counts={"steps": last["step"], "tokens": last["tokens"], **result["counts"]},
        metrics=metrics,
        world=result["world"],
        reports=(
            Report(f"{job.stage}-loss", "markdown", _plotted(curve), "The loss over the run"),
            Report(f"{job.stage}-curve", "table", _shown(curve), "Points of the curve"),
            Report(f"{job.stage}-run", "link", run_page(job.run_id), "All curves and samples"),
            *judged,
        ),
    )


def require_tokenizer_of(shards: Manifest, tokenizer: Manifest) -> None:
    """Raises UserError when token shards were written with another tokenizer: their ids would mean
    other pieces, and nothing else would show it."""
    written = shards.inputs.get("tokenizer", tokenizer.fingerprint)
    if written != tokenizer.fingerprint:
        raise UserError(
            f"token-shards/{shards.fingerprint[:12]} were written with tokenizer/{written[:12]}, "
            f"not with tokenizer/{tokenizer.fingerprint[:12]}; give that one, or write shards with "
            f"this one"
        )


def require_whole(work: Workspace, inputs: Iterable[Manifest]) -> None:
    """Raises UserError when a file that is to be learned from is not as its manifest says.

    Files of a store elsewhere are compared when they are fetched.
    """
    for manifest in inputs if work.is_local else ():
        work.store.verify(manifest)


def _follow(job: TrainingJob, work: Workspace) -> None:
    work.write_json(JOB, job.model_dump(mode="json"))
    leave_ray()  # the workers of the stages before would keep a gigabyte while we wait
    settings = Settings.load()
    client = jobs.client(settings, patience=jobs.PATIENCE)
    entrypoint = jobs.python_entrypoint("tasks.training.job", {"uri": work.uri, "path": work.path})
    attempt = jobs.Job(job.stage, job.fingerprint)
    submission = attempt.attach_or_submit(client, entrypoint, settings.environment())
    watch = _Watch(job, work)
    try:
        jobs.follow(client, submission, settings, watch.look)
    finally:
        watch.finish()
    if work.has(FAILURE):
        raise _mistake(work, json.loads(work.read_bytes(FAILURE))["message"])
    if not work.has(RESULT):
        raise jobs.JobFailed(f"Ray job {submission} ended without a model; see its log in Ray")


def _mistake(work: Workspace, message: str) -> UserError:
    """What ended a training for good; its checkpoints, hours of work, are not thrown away."""
    kept = sorted(name for name in work.names() if name.startswith(f"{CHECKPOINTS}/step-"))
    if not kept:
        return UserError(message)
    step = int(kept[-1].split("/")[1].removeprefix("step-"))
    where = work.location(CHECKPOINTS)
    return Unfinished(f"{message}; checkpoints up to step {step} are kept in {where}")


class _Watch:
    """Shows the progress that the job writes down."""

    def __init__(self, job: TrainingJob, work: Workspace) -> None:
        self.job, self.work = job, work
        self.progress: Any = None

    def look(self) -> None:
        if not self.work.has(PROGRESS):
            return
        record = json.loads(self.work.read_bytes(PROGRESS))
        if self.progress is None:
            total = record["tokens"] / record["step"] * record["steps"]
            label = f"{self.job.stage.capitalize()}"
            self.progress = self.work.progress(label, total, "tokens", record["tokens"])
        self.progress.label = f"{self.job.stage.capitalize()}, loss {record['loss']:.3f}"
        self.progress.update(record["tokens"])

    def finish(self) -> None:
        if self.progress is not None:
            self.look()
            self.progress.finish()


def _plotted(curve: list[dict[str, Any]]) -> str:
    tokens, loss = ([record[key] for record in curve] for key in ("tokens", "loss"))
    return plot(tokens, loss, "tokens", "loss (nats per token)")


def _judged(heldout: list[dict[str, float]]) -> list[dict[str, Any]]:
    """Held-out losses, the source's name in the place of the metric's."""
    names = {key: key.removeprefix("heldout_loss").lstrip("_") or "all" for key in heldout[-1]}
    names["step"] = "step"
    return [{names[key]: round(value, 4) for key, value in row.items()} for row in heldout]


def _shown(curve: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """About `SHOWN` points of the curve, the last one always among them."""
    every = max(len(curve) // SHOWN, 1)
    points = curve[::-1][::every][::-1]
    return [
        {
            "step": record["step"],
            "tokens": record["tokens"],
            "loss": round(record["loss"], 4),
            "bits per byte": record["bits_per_byte"] and round(record["bits_per_byte"], 4),
            "tokens/s": round(record["tokens_per_second"]),
        }
        for record in points
    ]
