"""A training stage on a stack of its own, from a corpus made here: what two benchmarks share."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import psutil

from benchmarks.stack import CHECKOUT, Home, home
from model.chat import Tokenizer
from tasks.runtime.manifest import Manifest
from tasks.runtime.store import MANIFEST, Store
from tasks.tokenizer.shards import encode_documents
from tasks.tokenizer.train import train_sentencepiece
from tasks.training.pretrain import PretrainConfig

RUNNER = """
import sys
from tasks.runtime.manifest import Manifest
from tasks.training.pretrain import PretrainConfig, pretrain
config, shards, tokenizer = sys.argv[1:]
manifests = {"shards": shards, "tokenizer": tokenizer}
inputs = {name: Manifest.model_validate_json(body) for name, body in manifests.items()}
print(pretrain(PretrainConfig.model_validate_json(config), **inputs).model_dump_json())
"""
VOCABULARY = 512


class Trainings:
    """Runs of the pretrain stage on one running stack."""

    def __init__(self, stack: Home) -> None:
        self.stack = stack
        self.store = Store.open(stack.settings)
        texts = [path.read_text() for path in sorted((CHECKOUT / "tasks").rglob("*.py"))]
        proto = train_sentencepiece(texts, VOCABULARY)
        ids, starts = encode_documents(Tokenizer(proto), texts)
        files = {"tokens-00000.npy": _npy(ids), "tokens-00000.documents.npy": _npy(starts)}
        self.inputs = {
            "shards": self._commit("token-shards", files, {"tokens": len(ids)}),
            "tokenizer": self._commit(
                "tokenizer", {"tokenizer.model": proto}, {"vocabulary": VOCABULARY}
            ),
        }

    def _commit(self, stage: str, files: dict[str, bytes], counts: dict[str, int]) -> Manifest:
        directory = self.store.directory(stage, f"{stage}-of-a-benchmark")
        entries = tuple(directory.write_bytes(name, body) for name, body in files.items())
        mark = f"{stage}-of-a-benchmark"
        marks = {"stage": stage, "version": 1, "fingerprint": mark, "content": mark}
        manifest = Manifest(files=entries, counts=counts, **marks)
        directory.write_bytes(MANIFEST, manifest.model_dump_json().encode())
        return manifest

    def start(self, config: PretrainConfig) -> subprocess.Popen[str]:
        """The stage in a process of its own, as a flow run would have it."""
        bodies = [self.inputs[name].model_dump_json() for name in ("shards", "tokenizer")]
        return subprocess.Popen(
            [sys.executable, "-c", RUNNER, config.model_dump_json(), *bodies],
            cwd=CHECKOUT,
            env=os.environ | self.stack.settings.environment() | {"PYTHONPATH": str(CHECKOUT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def ended(self, process: subprocess.Popen[str]) -> Manifest:
        out, err = process.communicate(timeout=900)
        if process.returncode:
            raise SystemExit(f"the training failed:\n{err[-4000:]}")
        return Manifest.model_validate(json.loads(out.splitlines()[-1]))

    def workers(self) -> list[psutil.Process]:
        """The processes that train now."""
        found = []
        for process in self.stack.processes():
            with contextlib.suppress(psutil.Error):
                if "RayTrainWorker" in " ".join(process.cmdline()):
                    found.append(process)
        return found


@contextlib.contextmanager
def trainings() -> Iterator[Trainings]:
    with home() as stack:
        stack.run("up", quiet=True)
        os.environ["GRISTMILL_HOME"] = str(stack.settings.home)
        yield Trainings(stack)


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()
