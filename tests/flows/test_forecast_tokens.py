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
    config = {"vocab_size": 4096, "kind": "unigram", "import_from": "elsewhere/then"}
    inputs = {"tokenizer": "a", "corpus": "the-corpus-of-then"}
    for stage, more in (
        ("tokenizer", {"config": config, "counts": {"vocabulary": 4096}}),
        ("token-shards", {"inputs": inputs, "counts": {"tokens": 1234}}),
    ):
        made = Manifest(stage=stage, version=1, fingerprint="a", content="a", **more)
        store.directory(stage, "a").write_bytes(MANIFEST, made.model_dump_json().encode())

    def forecast(*settings: str) -> int:
        wanted = [word for setting in settings for word in ("--set", f"tokenizer.{setting}")]
        return main(["forecast", *wanted, "--home", str(tmp_path)])

    for other in ("vocab_size=1000", "kind=bpe", "longest_piece=12", "character_coverage=0.999"):
        assert forecast("kind=unigram", other) == 0
        assert "no tokens of this vocabulary in the store" in capsys.readouterr().out
    # Of the same vocabulary they are taken, and then found to be none.
    assert forecast("kind=unigram") == 1
    told = capsys.readouterr()
    assert "token-shards/a of corpus the-corpus-o, 1,234 tokens" in told.out
    assert "no quick runs on this corpus" in told.err
