"""A checkpoint made elsewhere becomes a base model without a step, and no more is said of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flows.cli import main
from model.chat import Tokenizer
from model.engine import load_model
from model.foreign_vocabulary import load_for
from model.huggingface import save_directory
from tasks.export.card import card
from tasks.registry import models
from tasks.registry.register import RegisterBaseConfig, register_base
from tasks.runtime.manifest import Manifest
from tasks.runtime.settings import Settings
from tasks.runtime.store import Store
from tasks.tokenizer.imported import import_tokenizer
from tasks.training.finetune import FinetuneConfig
from tasks.training.pretrain import PretrainConfig, pretrain
from tests.foreign_checkpoints import byte_level
from tests.tasks.corpus.inline_shards import InlineSession
from tests.tasks.made_artifacts import commit
from tests.tiny_models import transformer


@pytest.fixture
def theirs(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint whose tokenizer is in another layout."""
    monkeypatch.setenv("GRISTMILL_SOURCE_ROOTS", str(home))
    monkeypatch.setattr("tasks.training.made.ray_session", InlineSession)
    folder = home / "theirs"
    save_directory(folder, transformer(vocab_size=byte_level("gpt2").get_vocab_size()))
    (folder / "tokenizer.json").write_text(byte_level("gpt2").to_str())
    return folder


@pytest.fixture
def base(theirs: Path) -> Manifest:
    names = Tokenizer(import_tokenizer(theirs / "tokenizer.json"))
    counts = {"vocabulary": len(names)}
    tokenizer = commit("tokenizer", {"tokenizer.json": names.data}, {}, counts=counts)
    written = {"tokenizer": tokenizer.fingerprint}
    shards = commit("token-shards", {}, written, counts={"tokens": 0})  # none are read
    config = PretrainConfig(start_from=str(theirs), tokens=0)
    return pretrain(config, shards=shards, tokenizer=tokenizer)


def test_its_weights_are_theirs_under_our_ids_and_its_record_is_of_no_step(
    base: Manifest, theirs: Path
) -> None:
    folder = Path(Store.open().of(base).path)
    names = Tokenizer.load(folder)
    expected = load_for(theirs, names).state_dict()
    made = load_model(folder).model.state_dict()
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[name], tensor) for name, tensor in expected.items())
    assert (base.counts["steps"], base.counts["tokens"], base.counts["context"]) == (0, 0, 128)
    assert base.counts["parameters"] == sum(tensor.numel() for tensor in expected.values())
    assert set(base.metrics) == {"mlflow_run_id"} and "curve.parquet" not in base.names()
    FinetuneConfig(sequence=128).require_context(base.counts["context"])


def test_it_is_registered_and_its_card_tells_of_no_training(base: Manifest) -> None:
    register_base(RegisterBaseConfig(model="theirs-base"), model=base)
    version = models.named("theirs-base")
    assert version.scores == {} and version.run_id == base.metrics["mlflow_run_id"]
    sizes = ("train_documents", "train_bytes", "heldout_documents", "heldout_bytes")
    split = commit("split", {}, {}, counts=dict.fromkeys(sizes, 1100))
    language = commit("language", {}, {}, config={"languages": ["en"]})
    lineage, folder = [base, split, language], Path(Store.open().of(base).path)
    told = card(version, folder, lineage)
    assert "It has the weights of the checkpoint `theirs`" in told
    for untrue in ("| pretrained on", "Left for training", "It was trained on", "It read"):
        assert untrue not in told
    counts = {"steps": 4, "tokens": 1024, "examples": 9}
    tuned = commit("finetune", {}, {}, counts=counts)
    told = card(version, folder, [tuned, *lineage])
    assert "It goes on from the checkpoint `theirs`" in told and "Left for training" in told
    assert "| fine-tuned on | 1,024 tokens in 4 steps |" in told and "| pretrained on" not in told


def test_no_step_goes_with_a_checkpoint_only_and_nothing_is_foreseen_of_it(
    theirs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for values in ({}, {"start_from": str(theirs), "weights": "best"}):
        with pytest.raises(ValueError, match="tokens 0 takes no step: it goes with start_from"):
            PretrainConfig.model_validate({"tokens": 0} | values)
    settings = ["--set", "pretrain.tokens=0", "--set", f"pretrain.start_from={theirs}"]
    assert main(["--home", str(Settings.load().home), "forecast", *settings]) == 1
    assert "takes no step, so nothing can be foreseen" in capsys.readouterr().err
