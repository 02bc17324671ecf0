"""Artifacts as a stage would have committed them."""

from __future__ import annotations

from typing import Any

from tasks.runtime.manifest import Manifest
from tasks.runtime.settings import Settings
from tasks.runtime.store import MANIFEST, Store


def commit(stage: str, files: dict[str, bytes], inputs: dict[str, str], **said: Any) -> Manifest:
    mark = f"{stage}-made-for-a-test"
    directory = Store.open(Settings.load()).directory(stage, mark)
    entries = tuple(directory.write_bytes(name, body) for name, body in files.items())
    marks = {"fingerprint": mark, "content": mark, "created": "2026-11-22T12:00:00"}
    manifest = Manifest(stage=stage, version=1, inputs=inputs, files=entries, **marks, **said)
    directory.write_bytes(MANIFEST, manifest.model_dump_json().encode())
    return manifest
