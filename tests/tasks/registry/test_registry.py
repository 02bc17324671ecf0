"""Runs and versions in a real MLflow store: found again, not logged twice, loadable, explained."""

import re
from pathlib import Path

import pytest
import torch

from model.chat import Tokenizer
from model.config import ModelConfig
from model.huggingface import load_directory, save_directory
from model.transformer import Transformer
from tasks.registry import models, tracking
from tasks.runtime.errors import UserError
from tasks.runtime.manifest import Manifest
from tasks.tokenizer.train import train_sentencepiece


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def mlflow(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    monkeypatch.setenv("GRISTMILL_HOME", str(home))
    monkeypatch.setenv("GRISTMILL_MLFLOW_URL", f"sqlite:///{home}/mlflow.db")
    monkeypatch.setenv("PREFECT_HOME", str(home))
    # MLflow and Settings.apply write these into the process; what was there comes back after.
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        monkeypatch.setenv(name, f"sqlite:///{home}/mlflow.db")


@pytest.fixture(scope="module")
def directory(home: Path) -> Path:
    """A tiny random model in Hugging Face format."""
    target = home / "model"
    texts = ["the quick brown fox jumps over the lazy dog and sleeps\n" * 20]
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=300,
        width=32,
        layers=2,
        heads=2,
        context=64,
    )
    save_directory(target, Transformer(config))
    (target / "tokenizer.model").write_bytes(train_sentencepiece(texts, 300))
    return target


def manifest(stage: str, mark: str) -> Manifest:
    return Manifest(stage=stage, version=1, fingerprint=mark, content=mark, counts={"rows": 3})


def test_a_resumed_run_continues_the_same_curve() -> None:
    inputs = {"shards": manifest("shards", "5" * 64)}
    run_id = tracking.open_run("pretrain", "f1", {"model": {"layers": 6}}, inputs)
    logger = tracking.MetricLogger(tracking.client().tracking_uri, run_id)
    for step in range(5):
        logger.log(step, {"loss": 5.0 - step, "learning_rate": 0.1})
    logger.close()
    assert tracking.open_run("pretrain", "f1", {}, inputs) == run_id
    logger = tracking.MetricLogger(tracking.client().tracking_uri, run_id)
    for step in range(3, 8):
        logger.log(step, {"loss": -1.0, "learning_rate": 0.1})
    logger.close()
    points = tracking.client().get_metric_history(run_id, "loss")
    assert [(point.step, point.value) for point in points] == [
        *((step, 5.0 - step) for step in range(5)),
        *((step, -1.0) for step in range(5, 8)),
    ]
    run = tracking.client().get_run(run_id)
    assert run.data.params["model.layers"] == "6"
    assert "`pretrain/f1` in the store" in run.data.tags["mlflow.note.content"]
    assert run.inputs.dataset_inputs[0].dataset.digest == "5" * 36


def test_what_a_kill_kept_from_a_step_is_logged_by_the_next_attempt() -> None:
    run_id = tracking.open_run("pretrain", "f10", {}, {})
    logger = tracking.MetricLogger(tracking.client().tracking_uri, run_id)
    logger.log(50, {"loss": 5.0})  # sent while the held-out loss of that step is reckoned
    logger.close()
    logger = tracking.MetricLogger(tracking.client().tracking_uri, run_id)
    for _ in range(2):
        logger.log(50, {"loss": 6.0})
        logger.log(50, {"heldout_loss": 7.0, "heldout_loss_notes": 8.0})
        logger.close()
        logger = tracking.MetricLogger(tracking.client().tracking_uri, run_id)
    logger.close()
    for key, value in (("loss", 5.0), ("heldout_loss", 7.0), ("heldout_loss_notes", 8.0)):
        points = tracking.client().get_metric_history(run_id, key)
        assert [(point.step, point.value) for point in points] == [(50, value)]


def test_texts_of_a_run_are_kept_beside_its_curves() -> None:
    run_id = tracking.open_run("pretrain", "f9", {}, {})
    logger = tracking.MetricLogger(tracking.client().tracking_uri, run_id)
    logger.log(1, {"loss": 1.0})
    logger.text("samples/step-00000001.txt", "once ▶ upon a time")
    logger.close()
    (kept,) = tracking.client().list_artifacts(run_id, "samples")
    path = tracking.client().download_artifacts(run_id, kept.path)
    assert Path(path).read_text() == "once ▶ upon a time"


def test_a_failed_stage_shows_as_failed() -> None:
    with pytest.raises(ZeroDivisionError), tracking.tracked("finetune", "f2", {}, {}) as run_id:
        _ = 1 / 0
    assert tracking.client().get_run(run_id).info.status == "FAILED"


def test_a_version_is_registered_once_with_lineage_and_answers(directory: Path) -> None:
    run_id = tracking.open_run("finetune", "f3", {}, {})
    arguments = ("tiny", run_id, directory, "finetune/f3", {"exact": 0.8}, {"input.pairs": "p"})
    version = models.register(*arguments)
    assert (version.version, version.artifact, version.scores) == (
        "1",
        "finetune/f3",
        {"exact": 0.8},
    )
    assert version.lineage["input.pairs"] == "p"
    assert models.register(*arguments) == version
    assert "| exact | 0.8 |" in tracking.client().get_model_version("tiny", "1").description
    models.set_alias("tiny", models.CHAMPION, "1")
    assert models.get("tiny", "champion").aliases == ("champion",)
    import mlflow

    mlflow.set_tracking_uri(tracking.client().tracking_uri)
    mlflow.set_registry_uri(tracking.client().tracking_uri)
    loaded = mlflow.pyfunc.load_model("models:/tiny@champion")
    assert [column.name for column in loaded.metadata.signature.inputs] == ["question"]
    answers = loaded.predict([{"question": "what is a fox?"}], params={"max_tokens": 4})
    assert len(answers) == 1 and isinstance(answers[0], str)


def test_a_base_model_continues_texts_and_is_named_without_an_alias(directory: Path) -> None:
    run_id = tracking.open_run("pretrain", "f5", {}, {})
    version = models.register("tiny-base", run_id, directory, "pretrain/f5", {}, {})
    assert models.named("tiny-base") == version and version.is_base
    import mlflow

    mlflow.set_tracking_uri(tracking.client().tracking_uri)
    mlflow.set_registry_uri(tracking.client().tracking_uri)
    loaded = mlflow.pyfunc.load_model("models:/tiny-base/1")
    assert [column.name for column in loaded.metadata.signature.inputs] == ["text"]
    answers = loaded.predict([{"text": "the quick brown"}], params={"max_tokens": 4})
    names = Tokenizer.load(directory)
    prompt = [names.begin, *names.encode("the quick brown")]
    model = load_directory(directory).eval()
    ids = torch.tensor([prompt])
    for _ in range(4):
        ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], dim=1)
    assert answers == [names.decode(ids[0, len(prompt) :].tolist())]


def test_a_missing_alias_names_what_exists() -> None:
    with pytest.raises(UserError, match=r"'tiny' has no version or alias 'best'; it has: 1 \(cha"):
        models.get("tiny", "best")
    with pytest.raises(UserError, match="no version exists; run: gristmill run pipeline"):
        models.get("other", "champion")


@pytest.mark.parametrize("name", ["a'b", "tiny' OR name = 'tiny", "", "two words"])
def test_what_is_no_name_has_no_version(name: str) -> None:
    told = re.escape(f"model {name!r} has no version or alias 'champion'; no version exists; run")
    with pytest.raises(UserError, match=told):
        models.named(name)
