"""A training as a Ray job: `python -m tasks.training.job '{"uri": …, "path": …}'`.

The job holds the Ray Train controller, so it survives the loss of the flow that asked for it. What
it trains stands in `_job.json` of the workspace; it says how far it is in `_progress.json`, and in
the end leaves `_result.json`, or `_failure.json` where trying again would not help. All begin with
`_`: they are scratch, and go when the stage commits.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from pydantic import BaseModel, ConfigDict

from tasks.runtime.manifest import Manifest
from tasks.runtime.ray_session import ray_session
from tasks.runtime.settings import Settings
from tasks.runtime.store import Directory
from tasks.training.options import RunOptions

JOB, PROGRESS, RESULT, FAILURE = "_job.json", "_progress.json", "_result.json", "_failure.json"
CHECKPOINTS, RAY_STATE = "_checkpoints", "_ray"

# With glibc's defaults every large tensor is mapped and unmapped page by page, as profiles showed.
# One arena, since Ray Train's loop is not the
# main thread.
ALLOCATOR = ":".join(
    (
        "glibc.malloc.hugetlb=1",
        "glibc.malloc.mmap_threshold=1073741824",
        "glibc.malloc.trim_threshold=4294967296",
        "glibc.malloc.arena_max=1",
    )
)


class PairsData(BaseModel):
    """Questions and answers to learn, a person's own conversations, and the share of documents
    replayed among them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pairs: Manifest
    passes: int
    replay: float
    conversations: Manifest | None = None

    def artifact_of(self, file: str) -> Manifest:
        """Which of the two has a file."""
        own = self.conversations
        return own if own is not None and file in own.names() else self.pairs


class TrainingJob(BaseModel):
    """Everything a worker needs to know, as JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: str
    fingerprint: str
    shape: dict[str, Any]  # model.config.ModelConfig
    loop: dict[str, Any]  # model.train.TrainConfig, without total_tokens when fine-tuning
    sequence: int
    document_masking: bool
    seed: int
    tokenizer: Manifest
    shards: Manifest | None
    base: Manifest | None  # the model to start from; None: a new one
    pairs: PairsData | None
    source_weights: dict[str, float] = {}  # of pretraining; empty: sources as they lie
    mask_share: float = 0.15  # of a model that is not causal
    judged: bool = False  # by held-out documents, while it trains
    start_from: str | None = None  # a Hugging Face directory that every worker sees
    run: RunOptions
    tracking_uri: str
    run_id: str

    @classmethod
    def load(cls, directory: Directory) -> TrainingJob:
        return cls.model_validate_json(directory.read_bytes(JOB))

    def with_workers(self, cpus: int, gpus: int) -> TrainingJob:
        """The number of workers settled, where it was left open.

        On two cores two workers of one thread each are faster than one of two threads, which
        spends a third of its time waiting for the other thread.
        """
        if self.run.workers:
            return self
        workers = min(2, cpus, int(self.loop["batch"]))
        if self.run.gpu:
            workers = min(workers, gpus)
        return self.model_copy(update={"run": self.run.model_copy(update={"workers": workers})})


def main(argument: str) -> None:
    directory = Directory(**json.loads(argument))
    job = TrainingJob.load(directory)
    if directory.has(FAILURE):
        directory.filesystem.delete_file(directory.location(FAILURE))
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"  # else the end is noticed seconds later
    with ray_session() as session:
        problem = impossible(job, session.cpus, session.gpus)
        if problem:
            directory.write_json(FAILURE, {"message": problem})
            return
        _fit(job.with_workers(session.cpus, session.gpus), directory)


def impossible(job: TrainingJob, cpus: int, gpus: int) -> str | None:
    """Why a cluster of so many CPUs and GPUs could never run the job; Ray would wait for ever."""
    needed = job.run.least_workers or job.run.workers or 1
    if job.run.gpu and needed > gpus:
        return (
            f"training needs a GPU for every worker, {needed} in all, and the Ray cluster has "
            f"{gpus}; lower run.workers, add nodes or set run.gpu=false"
        )
    if needed > cpus:
        return (
            f"{needed} training workers need {needed} CPUs, the Ray cluster has {cpus}; lower "
            f"run.workers or add nodes"
        )
    return None


def _fit(job: TrainingJob, directory: Directory) -> None:
    # These names are version 2 of Ray Train, but typed as version 1, which knows neither a range of
    # workers nor a worker's environment: hence the two types that are ignored below.
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    least, most = job.run.least_workers, job.run.workers
    trainer = TorchTrainer(
        _train,
        train_loop_config={"uri": directory.uri, "path": directory.path},
        # Counts of the loop and the digests of checkpoints go between CPUs also where GPUs train.
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if job.run.gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=(least, most) if least else most,  # type: ignore[arg-type]
            use_gpu=job.run.gpu,
            resources_per_worker={"CPU": 1, **({"GPU": 1} if job.run.gpu else {})},
        ),
        run_config=RunConfig(  # type: ignore[call-arg]
            name=f"{job.stage}-{job.fingerprint[:16]}",
            storage_filesystem=directory.filesystem,
            storage_path=directory.location(RAY_STATE),
            failure_config=FailureConfig(max_failures=job.run.restarts),
            worker_runtime_env={"env_vars": _worker_environment(job)},
        ),
    )
    trainer.fit()


def _train(config: dict[str, str]) -> None:
    """In a worker: the driver waits, and spares the 100 MB of what only workers need."""
    from tasks.training.worker import train_worker

    train_worker(config)


def _worker_environment(job: TrainingJob) -> dict[str, str]:
    environment = Settings.load().environment() | {"GLIBC_TUNABLES": ALLOCATOR}
    if job.run.threads:
        environment["OMP_NUM_THREADS"] = str(job.run.threads)
    return environment


if __name__ == "__main__":
    main(sys.argv[1])
