"""The stage that makes a trained model a version in MLflow's registry."""

from __future__ import annotations

from pydantic import Field

from tasks.registry import models, tracking
from tasks.runtime.manifest import Manifest
from tasks.runtime.settings import Settings
from tasks.runtime.stage import Outcome, Report, Workspace, stage
from tasks.runtime.stage_config import StageConfig


class RegisterConfig(StageConfig):
    """Under which name a trained model is registered."""

    model: str = Field(
        "gristmill",
        description="Name of the registered model; versions count up under it.",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$",
    )


def is_registered(manifest: Manifest) -> bool:
    """Whether MLflow still has the version this manifest speaks of."""
    version = models.find(str(manifest.config["model"]), str(manifest.metrics["version"]))
    return version is not None and version.artifact == manifest.metrics["artifact"]


@stage("register", version=1, still_true=is_registered)
def register(
    config: RegisterConfig, work: Workspace, *, model: Manifest, report: Manifest
) -> Outcome:
    """Register the model with its scores and lineage in MLflow."""
    settings = Settings.load()
    artifact = f"{model.stage}/{model.fingerprint}"
    scores = numbers(report)
    run_id = str(model.metrics.get("mlflow_run_id") or "") or tracking.open_run(
        model.stage, model.fingerprint, model.config, {}
    )
    tracking.log_metrics(run_id, scores)
    directory = work.scratch("model")
    for name in model.names():
        target = directory / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        target.symlink_to(work.store.local(model, name))
    version = models.register(
        config.model,
        run_id,
        directory,
        artifact,
        scores,
        {
            "report": f"{report.stage}/{report.fingerprint}",
            **{f"input.{key}": mark for key, mark in (model.inputs | report.inputs).items()},
        },
    )
    page = models.page(version, settings)
    return Outcome(
        metrics={
            "model": config.model,
            "version": version.version,
            "run_id": run_id,
            "artifact": artifact,
        },
        reports=(
            Report("model-version", "link", page, f"{config.model} version {version.version}"),
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
