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
from tasks.runtime.store import Store


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

    beside: tuple[str, ...] = Field(
        (),
        description="MODEL@VERSION of further versions, of this or of other models, by number or "
        "alias; each answers under its own name, and the first of another model under that "
        "model's, too.",
    )
    drain_seconds: int | None = Field(
        None,
        ge=1,
        description="How long a replica that is to end may go on with its answers; without it, as "
        "long as the longest answer of the served models may take.",
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
    """A version of the registry, with the names it has there."""

    asked: str
    """MODEL or MODEL@VERSION by which it was asked for: what a number names stays, what an alias
    names may be another version when Serve is started anew."""
    model: str
    version: str
    artifact: str
    aliases: tuple[str, ...] = ()


class Served(Chosen):
    """One beside the main version, and its share of the requests for its model's bare name."""

    share: float


class ServedConfig(StageConfig):
    """A version and how it is served: what identifies a deployment."""

    replicas: int
    most_replicas: int | None = None
    engine: EngineOptions = EngineOptions()
    version: Chosen
    draft: Chosen | None = None
    beside: tuple[Served, ...] = ()
    drain_seconds: int | None = None


def is_served(manifest: Manifest) -> bool:
    """Whether the endpoint answers as this manifest, the last one, says: which versions with which
    names, shares and engines, and how many replicas Serve was told to run.
    """
    settings = Settings.load()
    last = Store.open(settings).all("deploy")[-1]  # is what is served after a restart
    return last == manifest and _served(settings) == manifest.metrics["served"]


@stage("deploy", version=4, still_true=is_served)
def deploy_version(config: ServedConfig, work: Workspace) -> Outcome:
    """Serve the version; the one before answers until this one is warm."""
    settings = Settings.load()
    chosen, artifact = _found(config.version, work)
    served = serving.deploy(
        settings,
        chosen,
        artifact,
        replicas=config.replicas,
        most_replicas=config.most_replicas,
        beside=[serving.Beside(*_found(one, work), one.share) for one in config.beside],
        engine=config.engine,
        draft=_found(config.draft, work)[0] if config.draft else None,
        drain_seconds=config.drain_seconds,
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


def serve_version(
    params: DeployConfig, version: models.Version | None, named: str = models.CHAMPION
) -> Manifest | None:
    """Serve a version, `named` by number or alias; None, while planning, for one that is not chosen
    yet.
    """
    if version is None:
        plan_unknown("deploy", "depends on which version becomes the champion")
        return None
    draft = _chosen(models.named(params.draft), params.draft) if params.draft else None
    return deploy_version(
        ServedConfig(
            replicas=params.replicas,
            most_replicas=params.most_replicas,
            engine=params.engine,
            version=_chosen(version, f"{version.model}@{named}"),
            draft=draft and draft.model_copy(update={"aliases": ()}),
            beside=_beside(params, version),
            drain_seconds=params.drain_seconds,
        )
    )


def _beside(params: DeployConfig, main: models.Version) -> tuple[Served, ...]:
    """The canary, then the others, each version once: one that was tried may have become the main
    one. The first of another model answers under that model's bare name.
    """
    wanted = [(f"{main.model}@{params.canary}", params.canary_share)] if params.canary else []
    chosen: dict[tuple[str, str], Served] = {}
    known = {main.model}
    for asked, share in (*wanted, *((asked, 0.0) for asked in params.beside)):
        one = models.named(asked)
        key = (one.model, one.version)
        if key == (main.model, main.version) or key in chosen:
            continue
        alone = one.model not in known
        told = _chosen(one, asked).model_dump()
        chosen[key] = Served(**told, share=1.0 if alone else share)
        known.add(one.model)
    return tuple(chosen.values())


def _chosen(version: models.Version, asked: str) -> Chosen:
    return Chosen(
        asked=asked,
        model=version.model,
        version=version.version,
        artifact=version.artifact,
        aliases=tuple(sorted(version.aliases)),
    )


@flow(name="deploy", **HOOKS)
def deploy(
    model: str = "gristmill", version: str = "champion", deploy: DeployConfig = DeployConfig()
) -> None:
    """Serve a version of a registered model, named by number or alias."""
    serve_version(deploy, models.get(model, version), version)
