"""MLflow runs: one per trained artifact, found again by fingerprint.

The flow's side creates the run and hands its id to the workers; rank 0 logs, keyed by global step.
A worker that resumes after a kill replays steps: those already in MLflow are not logged twice.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from tasks.runtime.errors import Unavailable
from tasks.runtime.manifest import Manifest
from tasks.runtime.settings import Settings

EXPERIMENT = "gristmill"
KIND = {"mlflow.experimentKind": "custom_model_development"}
"""Without it MLflow shows training runs among pages for prompts, traces and judges."""
FLUSH_SECONDS = 2.0
PARAM_LENGTH = 500

logger = logging.getLogger("gristmill.registry")


def client(tracking_uri: str | None = None) -> MlflowClient:
    """A client of the tracking server."""
    settings = Settings.load()
    settings.apply()
    address = tracking_uri or settings.mlflow
    return MlflowClient(address, registry_uri=address)  # wherever this process looked before


def experiment_id(mlflow: MlflowClient, name: str = EXPERIMENT) -> str:
    try:
        found = mlflow.get_experiment_by_name(name)
        return str(found.experiment_id) if found else mlflow.create_experiment(name, tags=KIND)
    except MlflowException as error:
        if "already exists" in str(error):
            return experiment_id(mlflow, name)
        if "Max retries exceeded" in str(error) or "Connection" in str(error):
            raise Unavailable(
                f"MLflow does not answer at {mlflow.tracking_uri}; start it with: gristmill up"
            ) from error
        raise


def open_run(
    name: str,
    fingerprint: str,
    config: Mapping[str, Any],
    inputs: Mapping[str, Manifest],
    tags: Mapping[str, str] | None = None,
) -> str:
    """The id of the MLflow run of an artifact: the earlier one if an attempt was interrupted.

    `config` becomes params (nested keys dotted), every input manifest a dataset input with its
    fingerprint as digest.
    """
    mlflow = client()
    experiment = experiment_id(mlflow)
    earlier = mlflow.search_runs([experiment], f"tags.`gristmill.fingerprint` = '{fingerprint}'")
    if earlier:
        run_id = earlier[0].info.run_id
        mlflow.set_terminated(run_id, "RUNNING")
        return str(run_id)
    all_tags = {
        "gristmill.fingerprint": fingerprint,
        "gristmill.stage": name,
        "mlflow.note.content": note(name, fingerprint),
        **(tags or {}),
    }
    run = mlflow.create_run(experiment, run_name=f"{name} {fingerprint[:8]}", tags=all_tags)
    params = [Param(key, str(value)[:PARAM_LENGTH]) for key, value in flatten(config).items()]
    for start in range(0, len(params), 90):
        mlflow.log_batch(run.info.run_id, params=params[start : start + 90])
    mlflow.log_inputs(run.info.run_id, [dataset_input(key, m) for key, m in inputs.items()])
    return str(run.info.run_id)


def note(name: str, fingerprint: str) -> str:
    """What the run's page says of it, in Markdown."""
    text = f"The stage {name} of Gristmill; what it makes is `{name}/{fingerprint}` in the store."
    flow_run = os.environ.get("PREFECT__FLOW_RUN_ID")
    if flow_run:
        page = f"{Settings.load().prefect_dashboard}/v2/runs/flow-run/{flow_run}"
        text += f" [The run in Prefect that asked for it]({page})"
    return text


def finish_run(run_id: str, status: str = "FINISHED", **tags: str) -> None:
    """End a run as FINISHED, FAILED or KILLED, with last tags."""
    mlflow = client()
    if tags:
        mlflow.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
    mlflow.set_terminated(run_id, status)


@contextlib.contextmanager
def tracked(
    name: str,
    fingerprint: str,
    config: Mapping[str, Any],
    inputs: Mapping[str, Manifest],
) -> Iterator[str]:
    """An MLflow run around a stage: FINISHED at the end, FAILED or KILLED when it raises."""
    run_id = open_run(name, fingerprint, config, inputs)
    try:
        yield run_id
    except Exception:
        finish_run(run_id, "FAILED")
        raise
    except BaseException:
        finish_run(run_id, "KILLED")
        raise
    finish_run(run_id)


def log_metrics(run_id: str, metrics: Mapping[str, float], step: int = 0) -> None:
    now = int(time.time() * 1000)
    client().log_batch(
        run_id, metrics=[Metric(key, float(value), now, step) for key, value in metrics.items()]
    )


def log_file(run_id: str, path: Path, folder: str | None = None) -> None:
    client().log_artifact(run_id, str(path), folder)


def log_text(run_id: str, text: str, name: str) -> None:
    client().log_text(run_id, text, name)


def dataset_input(name: str, manifest: Manifest) -> DatasetInput:
    """A manifest as MLflow shows datasets: digest, place in the store, counts as profile."""
    dataset = Dataset(
        name=f"{manifest.stage}-{manifest.fingerprint[:12]}",
        digest=manifest.content[:36],
        source_type="gristmill",
        source=json.dumps({"stage": manifest.stage, "fingerprint": manifest.fingerprint}),
        profile=json.dumps(manifest.counts),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", name)])


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` → `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


class MetricLogger:
    """Metrics of one run, sent by a thread so that a training step never waits for MLflow.

    A server that is down costs nothing but delay: points are kept and sent when it is back.
    `close()` waits up to `patience` seconds for the rest and says what it had to drop.
    """

    def __init__(self, tracking_uri: str, run_id: str) -> None:
        self._mlflow = MlflowClient(tracking_uri)
        self._run_id = run_id
        self._points: list[Metric] = []
        self._texts: list[tuple[str, str]] = []
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._logged_to: dict[str, int] = {}  # by key, what was there before this logger
        self._thread = threading.Thread(target=self._send_all, name="mlflow metrics", daemon=True)
        self._thread.start()

    def _is_new(self, point: Metric) -> bool:
        """Whether no earlier attempt logged this key of this step. By key: a step's loss may be
        sent before its held-out loss is known, and a kill come in between.
        """
        if point.key not in self._logged_to:
            history = self._mlflow.get_metric_history(self._run_id, point.key)
            self._logged_to[point.key] = max((earlier.step for earlier in history), default=-1)
        return bool(point.step > self._logged_to[point.key])

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Keep the metrics of a global step; those an earlier attempt logged are not sent again."""
        now = int(time.time() * 1000)
        with self._lock:
            self._points += [Metric(key, float(value), now, step) for key, value in metrics.items()]

    def text(self, name: str, body: str) -> None:
        """Keep a text to be shown among the run's artifacts."""
        with self._lock:
            self._texts.append((name, body))

    def close(self, patience: float = 30.0) -> None:
        self._closing.set()
        self._thread.join(patience)
        if self._points:
            logger.warning("%d metric points never reached MLflow", len(self._points))

    def _send_all(self) -> None:
        while True:
            closing = self._closing.wait(FLUSH_SECONDS)
            while self._points:
                with self._lock:
                    batch = self._points[:900]
                try:
                    new = [point for point in batch if self._is_new(point)]
                    if new:
                        self._mlflow.log_batch(self._run_id, metrics=new)
                except Exception as error:
                    logger.warning("MLflow did not take %d points: %s", len(batch), error)
                    break
                with self._lock:
                    del self._points[: len(batch)]
            while self._texts and not self._points:  # a server that took no points is down
                name, body = self._texts.pop(0)
                try:
                    self._mlflow.log_text(self._run_id, body, name)
                except Exception as error:
                    logger.warning("MLflow did not take %s: %s", name, error)
            if closing:
                return
