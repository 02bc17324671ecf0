"""A forecast of the loss is made of tokens of the run's own vocabulary."""

from pathlib import Path

import pytest

from flows.cli import main
from tasks.runtime.manifest import Manifest
from tasks.runtime.settings import Settings
from tasks.runtime.store import MANIFEST, Store


def test_tokens_of_another_vocabulary_foresee_no_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GRISTMILL_HOME", str(tmp_path))
    store = Store.open(Settings.load())
    for stage, more in (
        ("tokenizer", {"config": {"vocab_size": 4096}, "counts": {"vocabulary": 4096}}),
        ("token-shards", {"inputs": {"tokenizer": "a"}}),
    ):
        made = Manifest(stage=stage, version=1, fingerprint="a", content="a", **more)
        store.directory(stage, "a").write_bytes(MANIFEST, made.model_dump_json().encode())
    wanted = ["--set", "tokenizer.vocab_size=1000", "--home", str(tmp_path)]
    assert main(["forecast", *wanted]) == 0
    assert "no tokens of this vocabulary in the store" in capsys.readouterr().out
    # Of the same vocabulary they are taken, and then found to be none.
    wanted[1] = "tokenizer.vocab_size=4096"
    assert main(["forecast", *wanted]) == 1
    assert "no quick runs on this corpus" in capsys.readouterr().err
