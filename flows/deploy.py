"""The `deploy` flow: serve a registered version, swapped in without dropping a request."""

from __future__ import annotations

from prefect import flow
from pydantic import Field

from flows.hooks import HOOKS
from serve import deploy as serving
from tasks.registry import models
from tasks.runtime.manifest import Manifest
from tasks.runtime.settings import Settings
from tasks.runtime.stage import (
    Outcome,
    Report,
    StageConfig,
    Workspace,
    plan_unknown,
    stage,
)


class DeployConfig(StageConfig):
    """How a version is served."""

    replicas: int = Field(1, ge=1, le=64, description="Engine replicas behind the endpoint.")


class Chosen(StageConfig):
    """A version of the registry."""

    model: str
    version: str
    artifact: str


class ServedConfig(DeployConfig):
    """A version and how it is served: what identifies a deployment."""

    version: Chosen


def is_served(manifest: Manifest) -> bool:
    """Whether the endpoint answers with the version this manifest speaks of."""
    return serving.served_version(Settings.load()) == manifest.metrics["serving"]


@stage("deploy", version=1, still_true=is_served)
def deploy_version(config: ServedConfig, work: Workspace) -> Outcome:
    """Serve the version; the one before answers until this one is warm."""
    settings = Settings.load()
    chosen = models.get(config.version.model, config.version.version)
    artifact = work.store.get(chosen.stage, chosen.fingerprint)
    work.store.verify(artifact)
    served = serving.deploy(settings, chosen, artifact, replicas=config.replicas)
    return Outcome(
        metrics={"serving": served, "version": chosen.version, "url": settings.serve},
        reports=(
            Report("endpoint", "link", f"{settings.serve}/v1/models", "OpenAI-compatible endpoint"),
            Report("chat-page", "link", f"{settings.serve}/", f"talk to {chosen.model} {served}"),
        ),
    )


def serve_version(params: DeployConfig, version: models.Version | None) -> Manifest | None:
    """Serve a version; None, while planning, for one that is not chosen yet."""
    if version is None:
        plan_unknown("deploy", "depends on which version becomes the champion")
        return None
    chosen = Chosen(model=version.model, version=version.version, artifact=version.artifact)
    return deploy_version(ServedConfig(version=chosen, **params.model_dump()))


@flow(name="deploy", **HOOKS)
def deploy(
    model: str = "gristmill", version: str = "champion", deploy: DeployConfig = DeployConfig()
) -> None:
    """Serve a version of a registered model, named by number or alias."""
    serve_version(deploy, models.get(model, version))
