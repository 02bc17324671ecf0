"""A model's files on this machine, whatever the store is, checked against their manifest."""

import os
from pathlib import Path

from serve.specification import ModelSpec
from tasks.runtime.errors import UserError
from tasks.runtime.store import Store


def fetch(spec: ModelSpec) -> Path:
    """The local directory of a model; files of a remote store are copied once to the cache.

    Raises UserError when the artifact is missing or a file differs from its manifest.
    """
    store = Store(spec.store, cache_directory())
    stage, _, fingerprint = spec.artifact.partition("/")
    manifest = store.find(stage, fingerprint)
    if manifest is None:
        raise UserError(f"the store {spec.store} has no artifact {spec.artifact}; train it again")
    directory = store.of(manifest)
    if directory.is_local:
        store.verify(manifest)
        return Path(directory.path)
    copies = [store.local(manifest, name) for name in manifest.names()]
    return store.cache / stage / fingerprint if copies else Path(directory.path)


def cache_directory() -> Path:
    """Where this machine keeps copies: in the home of the stack, or the user's cache on a
    cluster.
    """
    home = os.environ.get("GRISTMILL_HOME")
    if home:
        return Path(home) / "cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gristmill"
