"""What tests of training stages share: a small corpus, the stage as a flow would run it, and the
same training without Ray."""

from __future__ import annotations

import contextlib
import io
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet
import torch

from model.chat import Tokenizer
from model.loader import WindowLoader
from model.optim import OptimConfig
from model.schedule import Schedule
from model.train import train
from model.train_config import TrainConfig
from model.transformer import Transformer
from tasks.runtime.manifest import Manifest
from tasks.runtime.store import MANIFEST, Store
from tasks.tokenizer.shards import encode_documents, shard_sources
from tasks.tokenizer.train import train_sentencepiece
from tasks.training.finetune import FinetuneConfig
from tasks.training.options import ModelOptions, RunOptions
from tasks.training.pretrain import PretrainConfig
from tests.conftest import CHECKOUT, Stack

SMALL = ModelOptions(width=32, layers=2, heads=2, context=160)
RUN = RunOptions(workers=1, threads=1, checkpoint_every=10, log_every=2, peak_tflops=0.5)
CONFIG = PretrainConfig(
    tokens=40 * 8 * 64, sequence=64, batch=8, model=SMALL, precision="fp32", run=RUN
)
CITIES = ["Rome", "Oslo", "Lima", "Cairo", "Paris", "Delhi", "Quito", "Seoul"]


def changed(**values: object) -> PretrainConfig:
    return PretrainConfig.model_validate(CONFIG.model_dump() | values)


def small_corpus(stack: Stack) -> dict[str, Manifest]:
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
