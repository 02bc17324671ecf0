"""A Hugging Face checkpoint that pretraining goes on from: its place, shape, digest, tokenizer.

Its tokenizer is imported as any other is, and the tokens of the run are made with that; one in
another layout gets its rows moved to our ids when it is loaded (`model.foreign_vocabulary`).
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from model.chat import Tokenizer
from model.config import ModelConfig
from tasks.corpus.source_config import allowed
from tasks.runtime.errors import UserError
from tasks.runtime.progress import run_logger
from tasks.runtime.settings import Settings
from tasks.tokenizer.imported import NAMES, import_tokenizer, imported_file

TOLD_BY = ("tokenizer_config.json", "special_tokens_map.json")  # what their special tokens mean


def checkpoint_directory(path: str) -> Path:
    """The directory, if it lies below a source root and is there."""
    directory = allowed(Path(path), Settings.load(), "pretrain.start_from")
    if not (directory / "config.json").is_file():
        raise UserError(
            f"pretrain.start_from {path!r} holds no config.json; name the directory of a Hugging "
            f"Face checkpoint"
        )
    return directory


def checkpoint_digest(path: str) -> str:
    """SHA-256 over the shape, the weights and the tokenizer that lie there."""
    directory = checkpoint_directory(path)
    told = hashlib.sha256()
    names = [name for name in (*NAMES, *TOLD_BY) if (directory / name).is_file()]
    weights = sorted([directory / "config.json", *directory.glob("*.safetensors")])
    for file in (*weights, *(directory / name for name in names)):
        with open(file, "rb") as stream:
            told.update(f"{file.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}".encode())
    return told.hexdigest()


def checkpoint_shape(path: str, vocabulary: int) -> ModelConfig:
    """The shape that training goes on with. Raises UserError when it lacks rows for `vocabulary`.

    vocabulary: the tokens of this run's tokenizer, for which one in another layout gets its rows.
    """
    from model.foreign_vocabulary import is_foreign  # brings torch
    from model.huggingface import FormatError, load_config

    directory = checkpoint_directory(path)
    try:
        shape = load_config(directory)
    except FormatError as error:
        raise UserError(f"pretrain.start_from: {error}") from error
    if is_foreign(directory):
        return replace(shape, vocab_size=vocabulary)
    if vocabulary > shape.vocab_size:
        raise UserError(
            f"the tokenizer has {vocabulary} pieces, the checkpoint in {path} only "
            f"{shape.vocab_size}; take its own with tokenizer.import_from"
        )
    return shape


def left_out_of(directory: Path) -> str:
    """The parts of a checkpoint that the model goes on without, in words; said in the log, too."""
    from model.huggingface import left_out  # brings torch

    parts = ", ".join(left_out(directory))
    if parts:
        run_logger().warning(f"of {directory.name} is left out: {parts}")
    return parts


def require_import(start_from: str, import_from: str) -> None:
    """Raises UserError, before any work, when a checkpoint's tokenizer is not the one imported, or
    its weights cannot be gone on from."""
    if not start_from:
        return
    if not import_from:
        raise UserError(
            f"pretrain.start_from {start_from!r} goes on with the tokenizer of that checkpoint; "
            f"set tokenizer.import_from to the same directory"
        )
    ours = import_tokenizer(imported_file(import_from))
    directory = checkpoint_directory(start_from)
    require_tokenizer(directory, ours)
    require_weights(directory, ours)


def require_tokenizer(directory: Path, ours: bytes) -> None:
    """Raises UserError when `ours` is not the import of a checkpoint's own tokenizer: its ids would
    mean others."""
    theirs = [directory / name for name in NAMES if (directory / name).is_file()]
    if not any(import_tokenizer(file) == ours for file in theirs):
        raise UserError(
            f"the checkpoint in {directory} was not made with this run's tokenizer; set "
            f"tokenizer.import_from to the same directory"
        )


def require_weights(directory: Path, ours: bytes) -> None:
    """Raises UserError when a checkpoint lacks weights that its config.json asks for, or rows for
    the pieces of `ours`. However large it is, only names and shapes are read."""
    from model.foreign_vocabulary import parameters_for  # brings torch
    from model.huggingface import FormatError, require_parameters

    try:
        require_parameters(directory)
        parameters_for(directory, Tokenizer(ours))
    except FormatError as error:
        raise UserError(f"pretrain.start_from: {error}") from error
