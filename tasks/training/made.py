"""What a training leaves: a directory as Hugging Face's, of weights trained here or taken over."""

from __future__ import annotations

import tempfile
from pathlib import Path

from model.chat import Tokenizer
from model.foreign_vocabulary import load_for
from model.huggingface import SpecialTokens, save_directory
from model.tokenizer_files import tokenizer_files
from model.transformer import Transformer
from tasks.runtime.manifest import Manifest
from tasks.runtime.ray_session import ray_session
from tasks.runtime.stage import Outcome, Workspace
from tasks.runtime.store import Directory
from tasks.tokenizer.stored import load_tokenizer


def save_model(
    model: Transformer, tokenizer: Tokenizer, directory: Directory, *, tools: bool = False
) -> dict[str, int]:
    """Write the artifact; returns its counts for the manifest. tools: it learned to call
    some."""
    tokens = SpecialTokens(bos=tokenizer.begin, eos=tokenizer.stop_ids, pad=tokenizer.pad)
    with tempfile.TemporaryDirectory() as folder:
        save_directory(Path(folder), model, tokens)
        for file in sorted(Path(folder).iterdir()):
            directory.put(file, file.name)
    for name, body in tokenizer_files(tokenizer, model.config.context, tools=tools).items():
        directory.write_bytes(name, body)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"parameters": parameters, "context": model.config.context}


def take_over(start: Path, work: Workspace, tokenizer: Manifest) -> Outcome:
    """A checkpoint made elsewhere as it is, under the ids of `tokenizer`: no step is taken, and
    nothing is said of a loss or a time."""
    items = [(start, work, tokenizer)]
    with ray_session() as session:
        ((_, counts),) = session.map(_convert, items, label="Checkpoint", unit="checkpoints")
    return Outcome(counts={"steps": 0, "tokens": 0, **counts})


def _convert(start: Path, work: Workspace, tokenizer: Manifest) -> dict[str, int]:
    """In a Ray worker, whose memory the model takes."""
    names = load_tokenizer(work.store, tokenizer)
    return save_model(load_for(start, names), names, work)
