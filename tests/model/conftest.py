"""One thread for tiny models, as two that share cores with other processes wait for each other; and
a small text to learn."""

from pathlib import Path

import numpy as np
import pytest
import torch

from model.loader import WindowLoader
from tests.model.tiny_training import TEXT

torch.set_num_threads(1)


@pytest.fixture
def loader(tmp_path: Path) -> WindowLoader:
    np.save(tmp_path / "tokens-00000.npy", np.frombuffer(TEXT, np.uint8).astype(np.uint16))
    return WindowLoader([tmp_path / "tokens-00000.npy"], 32, seed=1)
