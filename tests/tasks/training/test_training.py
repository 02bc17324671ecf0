"""Pretraining and fine-tuning as Ray jobs on a real stack: artifacts, kills, cancels, errors."""

from __future__ import annotations

import contextlib
import io
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from model.chat import Tokenizer, encode_chat
from model.huggingface import load_directory
from model.loader import WindowLoader
from model.optim import OptimConfig
from model.schedule import Schedule
from model.train import train
from model.train_config import TrainConfig
from model.transformer import Transformer
from tasks.registry import tracking
from tasks.runtime.manifest import Manifest
from tasks.runtime.store import MANIFEST, Store
from tasks.tokenizer.shards import encode_documents, shard_sources
from tasks.tokenizer.train import train_sentencepiece
from tasks.training.finetune import FinetuneConfig
from tasks.training.options import ModelOptions, OptimizerOptions, RunOptions
from tasks.training.pretrain import PretrainConfig, pretrain
from tests.conftest import CHECKOUT, Stack

pytestmark = pytest.mark.timeout(500)

SMALL = ModelOptions(width=32, layers=2, heads=2, context=64)
RUN = RunOptions(workers=1, threads=1, checkpoint_every=10, log_every=2, peak_tflops=0.5)
CONFIG = PretrainConfig(
    tokens=40 * 8 * 64, sequence=64, batch=8, model=SMALL, precision="fp32", run=RUN
)
CITIES = ["Rome", "Oslo", "Lima", "Cairo", "Paris", "Delhi", "Quito", "Seoul"]


@pytest.fixture(autouse=True)
def home(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRISTMILL_HOME", str(stack.settings.home))
    return stack.settings.home


@pytest.fixture(scope="module")
def corpus(stack: Stack) -> dict[str, Manifest]:
    """Tokenizer, token shards and pairs of a small text, as their stages would leave them."""
    sentences = [f"The train to {city} leaves at noon. " for city in CITIES]
    texts = random.Random(0).choices(sentences, k=900)
    documents = ["".join(texts[first : first + 9]) for first in range(0, 900, 9)]
    proto = train_sentencepiece(documents, 320)
    ids, starts = encode_documents(Tokenizer(proto), documents)
    questions = [f"Where does train {number} go?" for number in range(len(CITIES))]
    answers = [f"To {city}." for city in CITIES]
    pairs = pa.table({"question": questions, "answer": answers})
    asked = pairs.set_column(0, "question", pa.array([f"And {q.lower()}" for q in questions]))
    tokenizer = commit(stack, "tokenizer", {"tokenizer.model": proto}, {"vocabulary": 320})
    shards = commit(
        stack,
        "token-shards",
        {"tokens-00000.npy": npy(ids), "tokens-00000.documents.npy": npy(starts)},
        {"tokens": len(ids)},
    )
    return {
        "tokenizer": tokenizer,
        "shards": shards,
        "pairs": commit(
            stack,
            "pairs",
            {"pairs-train.parquet": parquet(pairs), "questions-recall.parquet": parquet(asked)},
            {"pairs": 8},
        ),
    }


def commit(stack: Stack, stage: str, files: dict[str, bytes], counts: dict[str, int]) -> Manifest:
    mark = f"{stage}-of-the-training-tests"
    directory = Store.open(stack.settings).directory(stage, mark)
    entries = tuple(directory.write_bytes(name, body) for name, body in files.items())
    manifest = Manifest(
        stage=stage, version=1, fingerprint=mark, content=mark, counts=counts, files=entries
    )
    directory.write_bytes(MANIFEST, manifest.model_dump_json().encode())
    return manifest


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pa.parquet.write_table(table, sink)
    return sink.getvalue()


def losses(manifest: Manifest) -> dict[int, float]:
    curve = Store.open().of(manifest).read_table("curve.parquet")
    return dict(zip(curve["step"].to_pylist(), curve["loss"].to_pylist(), strict=True))


def logged_steps(manifest: Manifest) -> list[int]:
    run_id = str(manifest.metrics["mlflow_run_id"])
    return [point.step for point in tracking.client().get_metric_history(run_id, "loss")]


def bare_losses(
    config: PretrainConfig, shards: Manifest, vocabulary: int, model: Transformer | None = None
) -> dict[int, float]:
    """The same training without Ray, in this process; of a new model unless one is given."""
    torch.manual_seed(config.seed)
    names = shard_sources(shards.names(), "tokens")["seeds"]
    paths = [Store.open().local(shards, name) for name in names]
    loader = WindowLoader(paths, config.sequence, config.seed)
    loop = config.loop() | {
        "optim": OptimConfig(**config.optimizer.model_dump()),
        "schedule": Schedule(**config.schedule.model_dump()),
        "total_tokens": config.tokens,
    }
    model = model or Transformer(config.model.config(vocabulary))
    threads = torch.get_num_threads()
    torch.set_num_threads(config.run.threads)
    torch.set_flush_denormal(True)  # as a worker does
    try:
        return {r.step: r.loss for r in train(model, loader, TrainConfig(**loop))}
    finally:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(False)


def workers(home: Path) -> list[psutil.Process]:
    """The Ray Train workers of this stack, not of any other on the machine."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            is_worker = "RayTrainWorker" in " ".join(process.cmdline())
            if is_worker and process.environ().get("GRISTMILL_HOME") == str(home):
                found.append(process)
    return found


def first_checkpoint(process: subprocess.Popen[str], mark: str, home: Path) -> None:
    """Wait until a training has something to resume from; its own end is a failure."""
    deadline = time.monotonic() + 180
    while not checkpoints(mark, home):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "no checkpoint in 180 s"
        time.sleep(0.05)


RUNNER = """
import sys
from tasks.runtime.errors import UserError
from tasks.runtime.manifest import Manifest
from tasks.training.finetune import FinetuneConfig, finetune
from tasks.training.pretrain import PretrainConfig, pretrain
stage, config, *inputs = sys.argv[1:]
run, form = {"pretrain": (pretrain, PretrainConfig), "finetune": (finetune, FinetuneConfig)}[stage]
named = dict(text.split("=", 1) for text in inputs)
manifests = {name: Manifest.model_validate_json(body) for name, body in named.items()}
try:
    print(run(form.model_validate_json(config), **manifests).model_dump_json())
except UserError as error:
    sys.exit(f"UserError: {error}")
"""


@contextlib.contextmanager
def training(
    config: PretrainConfig | FinetuneConfig, stack: Stack, inputs: dict[str, Manifest]
) -> Iterator[subprocess.Popen[str]]:
    """The stage in a process of its own, as a flow run would be."""
    stage = "finetune" if "base" in inputs else "pretrain"
    bodies = [f"{name}={manifest.model_dump_json()}" for name, manifest in inputs.items()]
    process = subprocess.Popen(
        [sys.executable, "-c", RUNNER, stage, config.model_dump_json(), *bodies],
        cwd=CHECKOUT,
        env=os.environ | stack.settings.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


def trained(process: subprocess.Popen[str]) -> Manifest:
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    return Manifest.model_validate_json(out.splitlines()[-1])


def checkpoints(fingerprint: str, home: Path) -> list[Path]:
    return list((home / "store" / "pretrain" / fingerprint / "_checkpoints").glob("step-*"))


def drivers(mark: str) -> list[psutil.Process]:
    """The processes of the Ray jobs that work on a fingerprint."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            line = process.cmdline()
            if "tasks.training.job" in line and mark in line[-1]:
                found.append(process)
    return found


def changed(**values: object) -> PretrainConfig:
    return PretrainConfig.model_validate(CONFIG.model_dump() | values)


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


def test_fine_tuning_answers_what_it_was_taught(base: Manifest, corpus, stack: Stack) -> None:
    config = FinetuneConfig(
        passes=250,
        sequence=64,
        batch=4,
        replay=0.2,
        run=RUN,
        optimizer=OptimizerOptions(learning_rate=3e-3),
        precision="fp32",
    )
    with training(config, stack, {"base": base, "pairs": corpus["pairs"]}) as process:
        chat = trained(process)
    assert chat.counts["examples"] == 8 and chat.counts["examples_too_long"] == 0
    folder = Path(Store.open().of(chat).path)
    tokenizer, model = Tokenizer.load(folder), load_directory(folder).eval()
    # While it learned it was asked in words it is not taught.
    assert chat.metrics["heldout_loss"] < 5
    mlflow, run_id = tracking.client(), str(chat.metrics["mlflow_run_id"])
    shown = [file.path for file in mlflow.list_artifacts(run_id, "samples")]
    said = Path(mlflow.download_artifacts(run_id, shown[-1])).read_text()
    assert "And where does train 0 go?" in said and " ▶ " in said
    right = 0
    for number, city in enumerate(CITIES):
        question = {"role": "user", "content": f"Where does train {number} go?"}
        ids = encode_chat([question], tokenizer)
        while ids[-1] not in tokenizer.stop_ids and len(ids) < 60:
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        right += tokenizer.decode(ids).endswith(f"To {city}.")
    assert right >= 7


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
        (hot, "lower the learning rate or look at these sequences"),
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
