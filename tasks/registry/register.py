"""The stages that make a model a version in MLflow's registry: an evaluated one, or a base."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field

from tasks.registry import models, tracking
from tasks.runtime.manifest import Manifest
from tasks.runtime.settings import Settings
from tasks.runtime.stage import Outcome, Report, Workspace, stage
from tasks.runtime.stage_config import StageConfig

# Metrics of a pretraining by the names they have as scores: its own name is that of a curve.
BASE_SCORES = {"loss": "final_loss", "heldout_loss": "final_heldout_loss"}


class RegisterConfig(StageConfig):
    """Under which name a trained model is registered."""

    model: str = Field(
        "gristmill",
        description="Name of the registered model; versions count up under it.",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$",
    )


class RegisterBaseConfig(StageConfig):
    """Under which name a pretrained model is registered."""

    model: str = Field(
        "gristmill-base",
        description="Name of the registered base model; versions count up under it.",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,68}$",
    )

    @classmethod
    def beside(cls, register_as: RegisterConfig) -> RegisterBaseConfig:
        """The base model of one that is registered under `register_as`: MODEL-base."""
        return cls(model=f"{register_as.model}-base")


def is_registered(manifest: Manifest) -> bool:
    """Whether MLflow still has the version this manifest speaks of."""
    version = models.find(str(manifest.config["model"]), str(manifest.metrics["version"]))
    return version is not None and version.artifact == manifest.metrics["artifact"]


@stage("register", version=1, still_true=is_registered)
def register(
    config: RegisterConfig, work: Workspace, *, model: Manifest, report: Manifest
) -> Outcome:
    """Register the model with its scores and lineage in MLflow."""
    inputs = model.inputs | report.inputs
    lineage = {"report": f"{report.stage}/{report.fingerprint}", **_marks(inputs)}
    return _register(config.model, work, model, numbers(report), lineage)


@stage("register-base", version=1, still_true=is_registered)
def register_base(config: RegisterBaseConfig, work: Workspace, *, model: Manifest) -> Outcome:
    """Register a pretrained model in MLflow, to be exported; no alias of a served model moves."""
    told = numbers(model)
    scores = {score: told[metric] for metric, score in BASE_SCORES.items() if metric in told}
    return _register(config.model, work, model, scores, _marks(model.inputs))


def _marks(inputs: Mapping[str, str]) -> dict[str, str]:
    return {f"input.{name}": mark for name, mark in inputs.items()}


def _register(
    name: str,
    work: Workspace,
    model: Manifest,
    scores: Mapping[str, float],
    lineage: Mapping[str, str],
) -> Outcome:
    settings = Settings.load()
    artifact = f"{model.stage}/{model.fingerprint}"
    run_id = str(model.metrics.get("mlflow_run_id") or "") or tracking.open_run(
        model.stage, model.fingerprint, model.config, {}
    )
    tracking.log_metrics(run_id, scores)
    directory = work.scratch("model")
    for file in model.names():
        target = directory / file
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        target.symlink_to(work.store.local(model, file))
    version = models.register(name, run_id, directory, artifact, scores, lineage)
    page = models.page(version, settings)
    return Outcome(
        metrics={
            "model": name,
            "version": version.version,
            "run_id": run_id,
            "artifact": artifact,
        },
        reports=(
            Report("model-version", "link", page, f"{name} version {version.version}"),
            Report("training-run", "link", models.run_page(run_id, settings), "training run"),
        ),
    )


def numbers(report: Manifest) -> dict[str, float]:
    """The scores of an evaluation, without what is text."""
    return {
        key: float(value)
        for key, value in report.metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
