"""`gristmill export`: a registered version as a directory or file that other programs load."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from model.chat import Tokenizer
from model.huggingface import FormatError, load_directory
from model.tokenizer_files import chat_template
from serve.about import ancestry
from tasks.export.card import card
from tasks.export.gguf_file import write_gguf
from tasks.registry import models
from tasks.runtime.errors import UserError
from tasks.runtime.manifest import Manifest
from tasks.runtime.settings import Settings
from tasks.runtime.store import Store

OURS = ("curve.parquet", "report.json")  # of the artifact, nothing to other programs
CARD = "README.md"


def export(settings: Settings, arguments: argparse.Namespace) -> Path:
    """Write the version as `--format` says, with its card; returns the directory.

    Every file is compared with the manifest first. The directory appears whole or not at all.
    """
    version = models.named(arguments.model)
    store = Store.open(settings)
    artifact = store.find(version.stage, version.fingerprint)
    if artifact is None:
        raise UserError(
            f"{version.model} version {version.version} is {version.artifact}, which the store "
            f"{store.uri} does not hold; set GRISTMILL_STORE to the one it was made in"
        )
    store.verify(artifact)
    usual = f"{version.model}-{version.version}-{arguments.format}"
    target = (arguments.out or Path(usual)).resolve()
    try:
        _write(target, store, version, artifact, arguments.format)
    except OSError as error:
        raise UserError(
            f"{target} cannot be written: {error.strerror or error}; give another directory with "
            f"--out"
        ) from error
    return target


def _write(
    target: Path, store: Store, version: models.Version, artifact: Manifest, form: str
) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists and is not empty; give another directory with --out")
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for name in artifact.names():
            if name not in OURS:
                shutil.copyfile(store.local(artifact, name), partial / name)
        file = f"{version.model}-{version.version}.gguf" if form == "gguf" else None
        manifests = lineage(store, version, artifact)
        (partial / CARD).write_text(card(version, partial, manifests, file))
        if file is not None:
            _to_gguf(partial, file)
        if target.exists():
            target.rmdir()
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def lineage(store: Store, version: models.Version, artifact: Manifest) -> list[Manifest]:
    """The model's manifest, its evaluation's, and all they were made from."""
    stage, _, fingerprint = version.lineage.get("report", "").partition("/")
    report = store.find(stage, fingerprint) if fingerprint else None
    found = list(ancestry(store, artifact))
    known = {manifest.fingerprint for manifest in found}
    if report is not None:
        found += [m for m in ancestry(store, report) if m.fingerprint not in known]
    return found


def _to_gguf(directory: Path, name: str) -> None:
    """Put one file in the place of the directory's others; the card stays."""
    try:
        model = load_directory(directory)
        names = Tokenizer.load(directory)
        write_gguf(directory / name, model, names, Path(name).stem, chat_template(directory))
    except FormatError as error:
        raise UserError(str(error)) from error
    for file in directory.iterdir():
        if file.name not in (CARD, name):
            file.unlink()
