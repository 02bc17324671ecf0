"""A home with a registry of its own, for tests that need no server."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with MLflow's database in it."""
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    for name, value in (
        ("GRISTMILL_HOME", str(tmp_path)),
        ("GRISTMILL_MLFLOW_URL", uri),
        ("MLFLOW_TRACKING_URI", uri),
        ("MLFLOW_REGISTRY_URI", uri),
        ("PREFECT_HOME", str(tmp_path)),
    ):
        monkeypatch.setenv(name, value)
    return tmp_path
