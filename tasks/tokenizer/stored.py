"""The tokenizer that an artifact holds."""

from __future__ import annotations

from model.chat import TOKENIZER_FILES, Tokenizer
from tasks.runtime.manifest import Manifest
from tasks.runtime.store import Store


def load_tokenizer(store: Store, manifest: Manifest) -> Tokenizer:
    """Of the tokenizer stage's artifact, or of a model's."""
    held = set(manifest.names())
    name = next((name for name in TOKENIZER_FILES if name in held), TOKENIZER_FILES[0])
    return Tokenizer.load(store.local(manifest, name))
