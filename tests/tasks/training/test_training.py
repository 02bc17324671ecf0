"""Pretraining and fine-tuning as Ray jobs on a real stack: artifacts, kills, cancels, errors."""

from __future__ import annotations

import contextlib
import json
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch

from model.chat import Tokenizer, encode_chat
from model.huggingface import load_directory
from model.tokenizer_files import calls_tools
from tasks.registry import tracking
from tasks.runtime.manifest import Manifest
from tasks.runtime.store import Store
from tasks.training.conversations import ConversationsStageConfig, gather_conversations
from tasks.training.finetune import FinetuneConfig
from tasks.training.options import OptimizerOptions
from tasks.training.pretrain import PretrainConfig, pretrain
from tests.conftest import Stack
from tests.tasks.training.stage_runs import (
    CITIES,
    CONFIG,
    RUN,
    bare_losses,
    changed,
    checkpoints,
    commit,
    first_checkpoint,
    losses,
    small_corpus,
    trained,
    training,
    workers,
)

pytestmark = pytest.mark.timeout(500)


@pytest.fixture(autouse=True)
def home(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRISTMILL_HOME", str(stack.settings.home))
    return stack.settings.home


@pytest.fixture(scope="module")
def corpus(stack: Stack) -> dict[str, Manifest]:
    return small_corpus(stack)


def logged_steps(manifest: Manifest) -> list[int]:
    run_id = str(manifest.metrics["mlflow_run_id"])
    return [point.step for point in tracking.client().get_metric_history(run_id, "loss")]


def drivers(mark: str) -> list[psutil.Process]:
    """The processes of the Ray jobs that work on a fingerprint."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            line = process.cmdline()
            if "tasks.training.job" in line and mark in line[-1]:
                found.append(process)
    return found


@pytest.fixture(scope="module")
def inputs(corpus: dict[str, Manifest]) -> dict[str, Manifest]:
    return {"shards": corpus["shards"], "tokenizer": corpus["tokenizer"]}


@pytest.fixture(scope="module")
def base(stack: Stack, inputs: dict[str, Manifest]) -> Manifest:
    with training(CONFIG, stack, inputs) as process:
        return trained(process)


def test_pretraining_leaves_a_model_with_its_curve_and_run(base: Manifest, corpus) -> None:
    assert {
        "config.json",
        "model.safetensors",
        "generation_config.json",
        "tokenizer.model",
        "tokenizer.json",
        "curve.parquet",
    } <= set(base.names())
    assert not [name for name in Store.open().of(base).names() if name.startswith("_")]
    curve = losses(base)
    assert list(curve) == list(range(2, 41, 2)) and curve[40] < curve[2] / 2
    assert base.counts["steps"] == 40 and base.counts["tokens"] == CONFIG.tokens
    assert 0 < base.metrics["bits_per_byte"] < 3
    table = Store.open().of(base).read_table("curve.parquet")
    assert 0 < base.metrics["mfu"] < 1 and all(0 < share < 1 for share in table["mfu"].to_pylist())
    assert table["skipped"].to_pylist() == table["rollbacks"].to_pylist() == [0] * 20
    expected = bare_losses(CONFIG, corpus["shards"], 320)
    assert list(curve.values()) == pytest.approx(list(expected.values()), rel=1e-4)
    run_id = str(base.metrics["mlflow_run_id"])
    run = tracking.client().get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["model.layers"] == "2" and run.data.params["precision"] == "fp32"
    assert logged_steps(base) == list(curve)
    assert {entry.dataset.name.split("-")[0] for entry in run.inputs.dataset_inputs} == {
        "token",
        "tokenizer",
    }


CLOCK = {"type": "function", "function": {"name": "clock"}}
CALLED = [
    {"role": "user", "content": "What is the time?"},
    {"role": "assistant", "tool_calls": [{"function": {"name": "clock", "arguments": {}}}]},
]


@pytest.fixture
def conversations(home: Path) -> Manifest:
    """One that calls a tool."""
    path = home / "sources" / "talk.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"messages": CALLED, "tools": [CLOCK]}) + "\n")
    return gather_conversations(ConversationsStageConfig(path=str(path), repeat=2))


def test_fine_tuning_answers_and_calls_what_it_was_taught(
    base: Manifest, corpus, conversations: Manifest, stack: Stack
) -> None:
    config = FinetuneConfig(
        passes=250,
        sequence=160,
        batch=4,
        replay=0.2,
        run=RUN,
        optimizer=OptimizerOptions(learning_rate=3e-3),
        precision="fp32",
    )
    inputs = {"base": base, "pairs": corpus["pairs"], "conversations": conversations}
    with training(config, stack, inputs) as process:
        chat = trained(process)
    assert chat.counts["examples"] == 8 and chat.counts["examples_too_long"] == 0
    assert chat.counts["conversations"] == chat.counts["conversations_with_calls"] == 1
    assert chat.inputs["conversations"] == conversations.fingerprint
    folder = Path(Store.open().of(chat).path)
    tokenizer, model = Tokenizer.load(folder), load_directory(folder).eval()
    # While it learned it was asked in words it is not taught.
    assert chat.metrics["heldout_loss"] < 5
    mlflow, run_id = tracking.client(), str(chat.metrics["mlflow_run_id"])
    shown = [file.path for file in mlflow.list_artifacts(run_id, "samples")]
    said = Path(mlflow.download_artifacts(run_id, shown[-1])).read_text()
    assert "And where does train 0 go?" in said and " ▶ " in said

    def answer(question: str, tools: list[dict]) -> str:
        ids = encode_chat([{"role": "user", "content": question}], tokenizer, tools=tools)
        begins = len(ids)
        while ids[-1] not in tokenizer.stop_ids and len(ids) < 160:
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        return tokenizer.decode(ids[begins:])

    said = [answer(f"Where does train {number} go?", []) for number in range(len(CITIES))]
    assert sum(text == f"To {city}." for text, city in zip(said, CITIES, strict=True)) >= 7
    assert calls_tools(folder) and not calls_tools(Path(Store.open().of(base).path))
    call = '<tool_call>{"name": "clock", "arguments": {}}</tool_call>'
    assert answer("What is the time?", [CLOCK]) == call


@pytest.mark.slow
def test_two_workers_of_which_one_is_killed_follow_the_same_curve(inputs, stack, home) -> None:
    run = RUN.model_copy(update={"workers": 2})
    config = changed(seed=1, run=run.model_dump(), tokens=150 * 8 * 64)
    mark = pretrain.fingerprint(config, inputs)
    with training(config, stack, inputs) as process:
        first_checkpoint(process, mark, home)
        victims = workers(home)
        assert len(victims) == 2
        victims[1].send_signal(signal.SIGKILL)
        manifest = trained(process)
    assert manifest.world["workers"] == 2
    expected = bare_losses(config, inputs["shards"], 320)
    curve = losses(manifest)
    assert list(curve) == list(expected)
    # Two ranks add in another order than one, which in the end shows in the second digit.
    ours, one_rank = list(curve.values()), list(expected.values())
    assert ours[:30] == pytest.approx(one_rank[:30], rel=2e-3)
    assert ours == pytest.approx(one_rank, rel=0.15)
    steps = logged_steps(manifest)
    assert steps == sorted(set(steps))


@pytest.mark.slow
def test_with_room_for_fewer_workers_it_begins_with_these_on_the_same_batches(
    inputs, stack, home
) -> None:
    run = RUN.model_copy(update={"workers": 8, "least_workers": 1})
    config = changed(seed=6, run=run.model_dump(), tokens=30 * 8 * 64)
    with training(config, stack, inputs) as process:
        manifest = trained(process)
    assert 1 <= manifest.world["workers"] < 8  # what the cluster has, not what was asked for
    expected = bare_losses(config, inputs["shards"], 320)
    assert losses(manifest) == pytest.approx(expected, rel=2e-3)


@pytest.mark.slow
def test_the_best_weights_become_the_model_when_asked_for(inputs, stack, home) -> None:
    store = Store.open(stack.settings).of(inputs["shards"])
    files = {name: store.read_bytes(name) for name in inputs["shards"].names()}
    files |= {f"heldout-{name}": body for name, body in files.items()}
    judged = commit(stack, "judged-shards", files, inputs["shards"].counts)
    config = changed(
        seed=7,
        weights="best",
        heldout_every=5,
        tokens=40 * 8 * 64,
        # Rates that rise to the end: it learns, and then gets worse.
        optimizer=dict.fromkeys(
            ("muon_learning_rate", "learning_rate", "embedding_learning_rate"), 1.0
        ),
        schedule={"kind": "linear", "warmup": 1.0},
    )
    with training(config, stack, inputs | {"shards": judged}) as process:
        manifest = trained(process)
    best = manifest.counts["best_step"]
    assert 0 < best < 40 and best % 5 == 0
    run_id = str(manifest.metrics["mlflow_run_id"])
    looks = tracking.client().get_metric_history(run_id, "heldout_loss")
    told = {look.step: look.value for look in looks}
    assert manifest.metrics["heldout_loss"] == told[best] == min(told.values())


@pytest.mark.slow
def test_cancelling_stops_the_job_and_keeps_the_checkpoints(inputs, stack, home) -> None:
    config = changed(seed=2, tokens=100_000_000)
    mark = pretrain.fingerprint(config, inputs)
    with training(config, stack, inputs) as process:
        first_checkpoint(process, mark, home)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        deadline = time.monotonic() + 30
        while workers(home):
            assert time.monotonic() < deadline, "workers are left behind"
            time.sleep(0.1)
    assert Store.open().find("pretrain", mark) is None
    assert checkpoints(mark, home)


@pytest.mark.slow
def test_a_killed_job_is_resumed_to_the_bit(inputs, stack, home) -> None:
    config = changed(seed=3, tokens=150 * 8 * 64)
    mark = pretrain.fingerprint(config, inputs)
    with training(config, stack, inputs) as process:
        first_checkpoint(process, mark, home)
        for driver in drivers(mark):
            driver.send_signal(signal.SIGKILL)
        _, err = process.communicate(timeout=200)
        assert process.returncode != 0 and "JobFailed" in err
    with training(config, stack, inputs) as process:
        resumed = trained(process)
    assert losses(resumed) == bare_losses(config, inputs["shards"], 320)
    assert logged_steps(resumed) == list(losses(resumed))


@pytest.mark.slow
def test_a_run_whose_flow_was_killed_finds_its_job_again(inputs, stack, home) -> None:
    config = changed(seed=4, tokens=1500 * 8 * 64)
    mark = pretrain.fingerprint(config, inputs)
    with training(config, stack, inputs) as process:
        first_checkpoint(process, mark, home)
        before = {driver.pid for driver in drivers(mark)}
        process.kill()
        process.communicate()
    with training(config, stack, inputs) as process:
        time.sleep(5)
        assert {driver.pid for driver in drivers(mark)} <= before
        assert trained(process).fingerprint == mark


@pytest.mark.slow
def test_mistakes_are_told_in_one_sentence(inputs, stack, home) -> None:
    many = changed(seed=5, run=RUN.model_copy(update={"workers": 8}).model_dump())
    no_gpu = changed(seed=5, run=RUN.model_copy(update={"workers": 0, "gpu": True}).model_dump())
    hot = changed(optimizer={"learning_rate": 1e30})
    long = changed(sequence=50_000, model={"context": 50_000})
    for config, message in (
        (many, "8 training workers need 8 CPUs, the Ray cluster has"),
        (no_gpu, "training needs a GPU for every worker, 1 in all, and the Ray cluster has 0"),
        (hot, "look at these sequences: gristmill sequence token-shards/token-shards tokens-00000"),
        (long, "fewer than one sequence of 50000 + 1; lower pretrain.sequence"),
    ):
        with training(config, stack, inputs) as process:
            _, err = process.communicate(timeout=300)
        (sentence,) = [line for line in err.splitlines() if line.startswith("UserError")]
        assert message in sentence
        left = home / "store" / "pretrain" / pretrain.fingerprint(config, inputs)
        assert not left.exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sequence": 1024}, "sequence 1024 is longer than the model's context 256"),
        ({"model": {"width": 100, "heads": 3}}, "width 100 is not a multiple of heads 3"),
        ({"batch": 2, "run": {"workers": 4}}, "4 workers cannot share a batch of 2"),
        ({"schedule": {"warmup": 0.7}}, "more than the whole run"),
        ({"tokns": 5}, "Extra inputs are not permitted"),
    ],
)
def test_impossible_settings_are_refused_by_the_form(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PretrainConfig.model_validate(values)


def test_places_do_not_bear_identity_and_auto_is_resolved(inputs) -> None:
    elsewhere = changed(run={"workers": 2, "threads": 7, "micro_batch": 1})
    assert pretrain.fingerprint(CONFIG, inputs) == pretrain.fingerprint(elsewhere, inputs)
    auto = PretrainConfig()
    assert auto.resolve().precision in ("bf16", "fp32")
    assert pretrain.fingerprint(auto, inputs) == pretrain.fingerprint(auto.resolve(), inputs)
