"""The model registry: versions with lineage, aliases, scores.

A version's files are the artifact of the store it was made from, in Hugging Face format, wrapped in
an MLflow model (loader module and plain files, no pickle) that `mlflow.pyfunc.load_model` runs.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlflow as mlflow_api
from mlflow.entities.model_registry import ModelVersion as MlflowVersion
from mlflow.entities.model_registry import RegisteredModel
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

from tasks.registry.tracking import client
from tasks.runtime.errors import UserError
from tasks.runtime.settings import Settings

CHAMPION, CHALLENGER = "champion", "challenger"

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")  # what `tasks.registry.register` lets be one
BASE = "pretrain"  # the stage of models that continue a text; others answer questions


def _signature(given: str, found: str) -> ModelSignature:
    return ModelSignature(
        inputs=Schema([ColSpec(DataType.string, given)]),
        outputs=Schema([ColSpec(DataType.string, found)]),
        params=ParamSchema([ParamSpec("max_tokens", DataType.long, 64)]),
    )


@dataclass(frozen=True)
class Version:
    """One registered version. `artifact` is `stage/fingerprint` in the store."""

    model: str
    version: str
    run_id: str
    artifact: str
    aliases: tuple[str, ...]
    scores: Mapping[str, float]
    created: float
    lineage: Mapping[str, str]

    @property
    def stage(self) -> str:
        return self.artifact.split("/")[0]

    @property
    def is_base(self) -> bool:
        """Whether it was pretrained only."""
        return self.stage == BASE

    @property
    def fingerprint(self) -> str:
        return self.artifact.split("/")[1]


def register(
    model: str,
    run_id: str,
    directory: Path,
    artifact: str,
    scores: Mapping[str, float],
    lineage: Mapping[str, str],
) -> Version:
    """Register the artifact's directory as a new version, or return the version it already is."""
    for version in versions(model):
        if version.artifact == artifact:
            return version
    registry = client()
    mlflow_api.set_tracking_uri(registry.tracking_uri)
    mlflow_api.set_registry_uri(registry.tracking_uri)
    tags = {"gristmill.artifact": artifact, "gristmill.scores": json.dumps(dict(scores))}
    tags |= {f"gristmill.{key}": value for key, value in lineage.items()}
    base = artifact.startswith(f"{BASE}/")
    words = "A base model, pretrained" if base else "Trained, evaluated and served"
    os.environ["MLFLOW_RUN_ID"] = run_id
    try:
        with mlflow_api.start_run(run_id=run_id):
            logged = mlflow_api.pyfunc.log_model(
                name=model,
                loader_module="tasks.registry.flavor",
                data_path=str(directory),
                signature=_signature("text" if base else "question", "answer"),
                model_config={"base": base},
                pip_requirements=["gristmill"],
                tags=tags,
            )
        for name, value in scores.items():
            registry.log_metric(run_id, name, value, model_id=logged.model_id)
        if _registered(model) is None:
            registry.create_registered_model(model, description=f"{words} by Gristmill.")
        created = registry.create_model_version(
            model,
            logged.model_uri,
            run_id=run_id,
            tags=tags,
            description=described(artifact, scores),
            model_id=logged.model_id,
        )
    finally:
        os.environ.pop("MLFLOW_RUN_ID", None)
    return get(model, str(created.version))


def described(artifact: str, scores: Mapping[str, float]) -> str:
    """What the version's page says of it, in Markdown."""
    rows = "".join(f"| {name} | {value:.4g} |\n" for name, value in scores.items())
    return (
        f"The artifact `{artifact}` of the store, in Hugging Face format; its manifest names "
        f"inputs, code and packages.\n\n| score | value |\n|---|---|\n{rows}"
    )


def _registered(model: str) -> RegisteredModel | None:
    """None also for what is no name, and would end the string that it stands in."""
    if not NAME.fullmatch(model):
        return None
    return next(iter(client().search_registered_models(f"name = '{model}'")), None)


def versions(model: str) -> list[Version]:
    """All versions, newest first, with aliases and scores; empty for an unknown model."""
    found = _registered(model)
    if found is None:
        return []
    aliases: dict[str, list[str]] = {}
    for alias, number in found.aliases.items():
        aliases.setdefault(str(number), []).append(alias)
    numbers = client().search_model_versions(f"name = '{model}'", max_results=1000)
    rows = [_version(row, aliases.get(str(row.version), [])) for row in numbers]
    return sorted(rows, key=lambda row: int(row.version), reverse=True)


def models() -> list[str]:
    return [row.name for row in client().search_registered_models()]


def get(model: str, version_or_alias: str) -> Version:
    """A version by number or alias. Raises UserError naming what exists."""
    return _of(versions(model), model, version_or_alias)


def _of(rows: Sequence[Version], model: str, version_or_alias: str) -> Version:
    for row in rows:
        if version_or_alias == row.version or version_or_alias in row.aliases:
            return row
    known = ", ".join(f"{r.version} ({', '.join(r.aliases) or 'no alias'})" for r in rows[:10])
    remedy = f"it has: {known}" if rows else "no version exists; run: gristmill run pipeline"
    raise UserError(f"model {model!r} has no version or alias {version_or_alias!r}; {remedy}")


def named(text: str) -> Version:
    """The version that MODEL@VERSION names: a number or an alias; without it the champion, of a
    base model, which has none, the newest."""
    model, _, version = text.partition("@")
    rows = versions(model)
    if not version and rows and all(row.is_base for row in rows):
        return rows[0]
    return _of(rows, model, version or CHAMPION)


def find(model: str, version_or_alias: str) -> Version | None:
    try:
        return get(model, version_or_alias)
    except UserError:
        return None


def set_alias(model: str, alias: str, version: str) -> None:
    client().set_registered_model_alias(model, alias, version)


def set_scores(model: str, version: str, scores: Mapping[str, float]) -> None:
    client().set_model_version_tag(model, version, "gristmill.scores", json.dumps(dict(scores)))


def page(version: Version, settings: Settings | None = None) -> str:
    """The version's page in MLflow."""
    settings = settings or Settings.load()
    return f"{settings.mlflow}/#/models/{version.model}/versions/{version.version}"


def run_page(run_id: str, settings: Settings | None = None) -> str:
    """A run's page in MLflow."""
    settings = settings or Settings.load()
    try:
        experiment = client().get_run(run_id).info.experiment_id
    except MlflowException:
        return settings.mlflow
    return f"{settings.mlflow}/#/experiments/{experiment}/runs/{run_id}"


def _version(row: MlflowVersion, aliases: list[str]) -> Version:
    tags = {k.removeprefix("gristmill."): v for k, v in row.tags.items() if "gristmill." in k}
    return Version(
        model=row.name,
        version=str(row.version),
        run_id=row.run_id or "",
        artifact=tags.pop("artifact", "/"),
        aliases=tuple(sorted(aliases)),
        scores=json.loads(tags.pop("scores", "{}")),
        created=row.creation_timestamp / 1000,
        lineage=tags,
    )
