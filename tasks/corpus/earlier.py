"""Earlier corpora that a new one is compared with: found by name, their signatures made once.

Nothing of a corpus is kept for this in advance. What it was deduplicated by are signatures of all
that was measured; those of what it kept are made from its documents when a later corpus first asks
for them, and cached like any other artifact. So a corpus made before there was any such wish serves
as well as one made after.
"""

from __future__ import annotations

from collections.abc import Mapping

from tasks.corpus.dedup import DeduplicateConfig, deduplicate
from tasks.corpus.signatures import signatures
from tasks.runtime.errors import UserError
from tasks.runtime.manifest import COMPARED, Manifest
from tasks.runtime.store import Store

PREVIOUS = "previous"


def earlier_corpora(config: DeduplicateConfig, documents: Manifest) -> dict[str, Manifest]:
    """Signatures of the corpora in `config.against`, as inputs of `deduplicate`.

    Raises UserError for a fingerprint that names no corpus, or that of these very documents.
    """
    found: dict[str, Manifest] = {}
    for name in config.against:
        if name == PREVIOUS:
            found.update({m.fingerprint: m for m in _before(documents)})
            continue
        corpus = Store.open().get(deduplicate.name, name)
        if corpus.input_contents.get("documents") == documents.content:
            raise UserError(
                f"deduplicate.against names {name!r}, which is made of the same documents: "
                "none would be left; name an earlier corpus or 'previous'"
            )
        found[corpus.fingerprint] = corpus
    signing = config.signatures()
    return {
        f"{COMPARED}{number:03d}": signatures(signing, documents=corpus)
        for number, corpus in enumerate(found.values())
    }


def _before(documents: Manifest) -> list[Manifest]:
    """The newest corpus of other material, and those it was compared with.

    Newest before the first corpus of this material: what a run means by `previous` changes neither
    when it is repeated nor when a filter is set otherwise.
    """
    store = Store.open()
    known = {m.fingerprint: m for stage in store.stages() for m in store.all(stage)}
    corpora = store.all(deduplicate.name)
    material = _material(documents, known)
    own: list[Manifest] = []
    others: list[Manifest] = []
    for corpus in corpora:
        made_of = known.get(corpus.inputs["documents"])
        same = made_of is not None and _material(made_of, known) == material
        (own if same else others).append(corpus)
    others = [corpus for corpus in others if not own or corpus.created < own[0].created]
    if not others:
        return []
    newest = others[-1]
    compared = [
        known[fingerprint].inputs["documents"]
        for key, fingerprint in newest.inputs.items()
        if key.startswith(COMPARED) and fingerprint in known
    ]
    return [newest, *(corpus for corpus in corpora if corpus.fingerprint in compared)]


def _material(documents: Manifest, known: Mapping[str, Manifest]) -> frozenset[str]:
    """What documents were made of in the end: contents of crawls, digests of sources."""
    found: set[str] = set()
    waiting = [documents]
    while waiting:
        manifest = waiting.pop()
        found.update(manifest.config.get("digests", ()))  # of a gather stage
        waiting += [known[f] for f in manifest.inputs.values() if f in known]
        if not manifest.inputs and "digests" not in manifest.config:
            found.add(manifest.content)
    return frozenset(found)
