"""Made-up models behind the real endpoint: random weights, real tokenizer, registered nowhere."""

from __future__ import annotations

import functools
import hashlib
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from benchmarks.stack import Home
from model.chat import Tokenizer
from model.config import ModelConfig
from model.huggingface import SpecialTokens, save_directory
from model.transformer import Transformer
from serve import deploy as serving
from serve.specification import EngineOptions
from tasks.registry.models import Version
from tasks.runtime.manifest import Manifest
from tasks.runtime.store import MANIFEST, Store
from tasks.tokenizer.train import train_sentencepiece

VOCABULARY = 6000
THIRTY_MILLION = ModelConfig(vocab_size=8192, width=512, layers=8, heads=8, context=2048)
SMALL = ModelConfig(vocab_size=VOCABULARY, width=128, layers=4, heads=4, context=512)


@functools.cache
def tokenizer() -> Tokenizer:
    """Learned from sources of the standard library."""
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [source.read_text(encoding="utf-8", errors="replace") for source in sources]
    return Tokenizer(train_sentencepiece(texts, VOCABULARY))


def write_model(path: Path, config: ModelConfig, seed: int) -> Path:
    """A model directory; weights large enough for logits that rounding does not bring together."""
    torch.manual_seed(seed)
    model = Transformer(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.mul_(3)
    names = tokenizer()
    special = SpecialTokens(bos=names.begin, eos=names.stop_ids, pad=names.pad)
    save_directory(path, model, special)
    (path / names.file_name).write_bytes(names.data)
    return path


def stored(
    store: Store,
    model: str,
    number: int,
    directory: Callable[[], Path],
    scores: dict[str, float] | None = None,
    lineage: dict[str, str] | None = None,
) -> tuple[Version, Manifest]:
    """A version that no registry knows and its artifact in the store, made of a model directory
    when it is not there yet.
    """
    fingerprint = hashlib.sha256(f"{model} {number}".encode()).hexdigest()
    manifest = store.find("finetune", fingerprint)
    if manifest is None:
        target = store.directory("finetune", fingerprint)
        manifest = Manifest(
            stage="finetune",
            version=1,
            fingerprint=fingerprint,
            content=fingerprint,
            files=tuple(target.put(file, file.name) for file in directory().iterdir()),
        )
        target.write_bytes(MANIFEST, manifest.model_dump_json().encode())
    version = Version(
        model=model,
        version=str(number),
        run_id="a-run",
        artifact=f"finetune/{fingerprint}",
        aliases=(),
        scores=scores or {},
        created=time.time(),
        lineage=lineage or {},
    )
    return version, manifest


class Models:
    """Versions 1, 2, … of a made-up model in the store of a running stack, to be deployed."""

    def __init__(self, fresh: Home, config: ModelConfig, scratch: Path) -> None:
        self.fresh, self.config, self.scratch = fresh, config, scratch
        self.store = Store.open(fresh.settings)

    def directory(self, number: int) -> Path:
        path = self.scratch / str(number)
        return path if path.exists() else write_model(path, self.config, number)

    def version(self, number: int) -> tuple[Version, Manifest]:
        return stored(self.store, "gristmill", number, lambda: self.directory(number))

    def deploy(self, number: int, engine: EngineOptions | None = None) -> str:
        return serving.deploy(self.fresh.settings, *self.version(number), engine=engine)

    def replica(self) -> psutil.Process:
        """The process that answers."""
        for process in self.fresh.processes():
            if "ServeReplica" in " ".join(process.cmdline()):
                return process
        raise SystemExit("no replica of the endpoint runs")

    def engine(self) -> psutil.Process:
        """The process of its engine."""
        for process in self.replica().children():
            if "serve.engine_process" in " ".join(process.cmdline()):
                return process
        raise SystemExit("the replica has no engine")
