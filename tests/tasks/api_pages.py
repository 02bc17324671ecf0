"""A small corpus of API documentation, in the layout the extract stage gives the embedded site."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import inspect
from typing import Any

import pyarrow as pa

from tasks.runtime.stage import Outcome, Workspace, stage
from tasks.runtime.stage_config import StageConfig

TRAIN = ("textwrap", "shutil", "json", "string", "shlex", "fnmatch", "glob", "copy", "bisect")
HELDOUT = ("heapq", "statistics", "colorsys")


def page(name: str) -> str:
    """The module's page as Markdown: its docstring, then each public function."""
    module = importlib.import_module(name)
    parts = [f"# `{name}`", inspect.cleandoc(module.__doc__ or "").split("\n\n")[0]]
    parts.append("See also: `re`, `os`.")
    for member, value in sorted(vars(module).items()):
        if member.startswith("_") or not callable(value) or not value.__doc__:
            continue
        if getattr(value, "__module__", None) != name:
            continue
        signature = ""
        with contextlib.suppress(ValueError):
            signature = str(inspect.signature(value))
        word = "class " if inspect.isclass(value) else ""
        parts += [f"## {word}{name}.{member}{signature}", inspect.cleandoc(value.__doc__)]
    return "\n\n".join(parts)


def documents(texts: dict[str, str]) -> pa.Table:
    """Title → text as a table of the documents' columns that later stages read."""
    rows: list[dict[str, Any]] = []
    for title, text in texts.items():
        name = hashlib.sha256(text.encode()).hexdigest()[:16]
        about = {"url": f"http://site/{title}", "title": title, "language": "en", "warc": "w.gz"}
        rows.append({"id": name, **about, "text": text})
    return pa.Table.from_pylist(rows)


class PagesConfig(StageConfig):
    train: tuple[str, ...] = TRAIN
    heldout: tuple[str, ...] = HELDOUT


@stage("split", version=1)
def split_pages(config: PagesConfig, work: Workspace) -> Outcome:
    """Two training shards and one held-out shard of module pages."""
    half = len(config.train) // 2
    shards = {
        "train-00000": config.train[:half],
        "train-00001": config.train[half:],
        "heldout-00000": config.heldout,
    }
    for name, modules in shards.items():
        work.write_table(f"{name}.parquet", documents({m: page(m) for m in modules}))
    return Outcome(counts={"train_documents": len(config.train)})
