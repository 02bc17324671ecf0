"""Real inputs beside the checkout (../shared/data): required where CI=true, else skipped."""

import os
from pathlib import Path

import pytest

SHARED = Path(__file__).parents[4] / "shared" / "data"


def shared(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        message = f"{path} is missing: these tests need the shared data beside the checkout"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return path
