"""The corpus report in MLflow, where there is one: a run for the corpus, with the page on it."""

from __future__ import annotations

from collections.abc import Mapping

from tasks.runtime.errors import Unavailable, UserError
from tasks.runtime.manifest import Manifest
from tasks.runtime.progress import run_logger
from tasks.runtime.rest import Refused, call
from tasks.runtime.settings import Settings
from tasks.runtime.stage import Workspace


def track(
    work: Workspace, inputs: Mapping[str, Manifest], numbers: Mapping[str, int], html: str
) -> str:
    """Log numbers and page; the address of the page in MLflow, empty when MLflow is not there.

    A corpus is worth having without MLflow, so this never fails a stage.
    """
    settings = Settings.load()
    if not _answers(settings):
        run_logger().info(f"MLflow does not answer at {settings.mlflow}: the report is not there")
        return ""
    from tasks.registry import tracking  # seconds to import

    try:
        with tracking.tracked("corpus-report", work.fingerprint, {}, inputs) as run:
            tracking.log_metrics(run, numbers)
            tracking.log_text(run, html, "report.html")
            experiment = tracking.experiment_id(tracking.client())
    except Unavailable as error:
        run_logger().warning(str(error))
        return ""
    return f"{settings.mlflow}/#/experiments/{experiment}/runs/{run}/artifacts/report.html"


def untrack(fingerprint: str) -> None:
    """Replace a report's page in MLflow; raises UserError when MLflow cannot be asked."""
    settings = Settings.load()
    if not _answers(settings):
        raise UserError(
            f"the corpus report {fingerprint[:12]} quotes what is to be erased and may be in "
            f"MLflow, which does not answer at {settings.mlflow}; start it: gristmill up"
        )
    from tasks.registry import tracking

    mlflow = tracking.client()
    tag = f"tags.`gristmill.fingerprint` = '{fingerprint}'"
    for run in mlflow.search_runs([tracking.experiment_id(mlflow)], tag):
        tracking.log_text(run.info.run_id, "erased on request\n", "report.html")


def _answers(settings: Settings) -> bool:
    try:
        call(f"{settings.mlflow}/health", timeout=2)
    except (OSError, Refused):
        return False
    return True
