"""The `deploy` flow: serve a registered version, swapped in without dropping a request."""

from __future__ import annotations

import json

from prefect import flow
from pydantic import Field, model_validator

from flows.hooks import HOOKS
from serve import deploy as serving
from serve.specification import EngineOptions
from tasks.registry import models
from tasks.runtime.manifest import Manifest
from tasks.runtime.planning import plan_unknown
from tasks.runtime.settings import Settings
from tasks.runtime.stage import Outcome, Report, Workspace, stage
from tasks.runtime.stage_config import StageConfig


class DeployConfig(StageConfig):
    """How a version is served."""

    replicas: int = Field(1, ge=1, le=64, description="Engine replicas behind the endpoint.")
    most_replicas: int | None = Field(
        None,
        ge=1,
        le=64,
        description="Serve adds replicas up to this number while requests outnumber the slots.",
    )
    engine: EngineOptions = EngineOptions()
    draft: str | None = Field(
        None,
        description="MODEL@VERSION of a smaller model with the same tokenizer, which guesses "
        "engine.speculate tokens ahead; answers are the same and come sooner where it is right.",
    )
    canary: str | None = Field(
        None,
        description="Another version of the same model, by number or alias, that answers a share "
        "of the requests. It is also served under its own name, MODEL@VERSION.",
    )
    canary_share: float = Field(
        0.1, ge=0, le=1, description="The canary's share of the requests; 0: only by its own name."
    )

    @model_validator(mode="after")
    def _go_together(self) -> DeployConfig:
        if self.most_replicas is not None and self.most_replicas < self.replicas:
            raise ValueError(
                f"most_replicas {self.most_replicas} is below replicas {self.replicas}; raise it "
                "or leave it out"
            )
        if self.draft is not None and not self.engine.speculate:
            raise ValueError(
                f"draft {self.draft!r} guesses engine.speculate tokens, which is 0; raise it"
            )
        return self


class Chosen(StageConfig):
    """A version of the registry."""

    model: str
    version: str
    artifact: str


class ServedConfig(StageConfig):
    """A version and how it is served: what identifies a deployment."""

    replicas: int
    most_replicas: int | None = None
    engine: EngineOptions = EngineOptions()
    version: Chosen
    draft: Chosen | None = None
    canary: Chosen | None = None
    canary_share: float = 0.0


def is_served(manifest: Manifest) -> bool:
    """Whether the endpoint answers as this manifest says: which versions, shares and engines."""
    return _served(Settings.load()) == manifest.metrics["served"]


@stage("deploy", version=3, still_true=is_served)
def deploy_version(config: ServedConfig, work: Workspace) -> Outcome:
    """Serve the version; the one before answers until this one is warm."""
    settings = Settings.load()
    chosen, artifact = _found(config.version, work)
    canaries = []
    if config.canary is not None:
        canaries = [serving.Canary(*_found(config.canary, work), config.canary_share)]
    served = serving.deploy(
        settings,
        chosen,
        artifact,
        replicas=config.replicas,
        most_replicas=config.most_replicas,
        canaries=canaries,
        engine=config.engine,
        draft=_found(config.draft, work)[0] if config.draft else None,
    )
    return Outcome(
        metrics={
            "serving": served,
            "version": chosen.version,
            "served": _served(settings),
            "url": settings.serve,
        },
        reports=_links(settings, config.engine, f"talk to {chosen.model} {served}"),
    )


def _links(settings: Settings, engine: EngineOptions, talk: str) -> tuple[Report, ...]:
    """What the run page leads to; the chat page is our own engine's."""
    url = settings.serve
    endpoint = Report("endpoint", "link", f"{url}/v1/models", "OpenAI-compatible endpoint")
    if engine.kind == "vllm":
        return (endpoint,)
    return endpoint, Report("chat-page", "link", f"{url}/", talk)


def _served(settings: Settings) -> str:
    return json.dumps(serving.served(settings), sort_keys=True)


def _found(version: Chosen, work: Workspace) -> tuple[models.Version, Manifest]:
    """A version and its artifact, whose files are what they were."""
    chosen = models.get(version.model, version.version)
    artifact = work.store.get(chosen.stage, chosen.fingerprint)
    work.store.verify(artifact)
    return chosen, artifact


def serve_version(params: DeployConfig, version: models.Version | None) -> Manifest | None:
    """Serve a version; None, while planning, for one that is not chosen yet."""
    if version is None:
        plan_unknown("deploy", "depends on which version becomes the champion")
        return None
    canary = models.get(version.model, params.canary) if params.canary else None
    if canary is not None and canary.version == version.version:
        canary = None  # the version that was tried has become the main one
    draft = models.named(params.draft) if params.draft else None
    return deploy_version(
        ServedConfig(
            replicas=params.replicas,
            most_replicas=params.most_replicas,
            engine=params.engine,
            version=_chosen(version),
            draft=draft and _chosen(draft),
            canary=canary and _chosen(canary),
            canary_share=params.canary_share if canary else 0.0,
        )
    )


def _chosen(version: models.Version) -> Chosen:
    return Chosen(model=version.model, version=version.version, artifact=version.artifact)


@flow(name="deploy", **HOOKS)
def deploy(
    model: str = "gristmill", version: str = "champion", deploy: DeployConfig = DeployConfig()
) -> None:
    """Serve a version of a registered model, named by number or alias."""
    serve_version(deploy, models.get(model, version))
