"""Earlier corpora that a new one is compared with: found by name, their signatures made once.

Nothing of a corpus is kept for this in advance. Its signatures are a stage of their own, made from
its documents when a later corpus first asks for them, and cached like any other artifact. So a
corpus made before there was any such wish serves as well as one made after.
"""

from __future__ import annotations

from tasks.corpus.dedup import DeduplicateConfig, deduplicate
from tasks.corpus.signatures import signatures
from tasks.runtime.errors import UserError
from tasks.runtime.manifest import Manifest
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
        f"earlier_{number:03d}": signatures(signing, documents=corpus)
        for number, corpus in enumerate(found.values())
    }


def _before(documents: Manifest) -> list[Manifest]:
    """The newest corpus of other documents, and those it was compared with.

    Newest before the first corpus of these documents: what a run means by `previous` does not
    change when it is repeated.
    """
    store = Store.open()
    corpora = store.all(deduplicate.name)
    own = [c for c in corpora if c.input_contents.get("documents") == documents.content]
    others = [c for c in corpora if c not in own and (not own or c.created < own[0].created)]
    if not others:
        return []
    newest = others[-1]
    compared = [
        store.find(signatures.name, fingerprint)
        for key, fingerprint in newest.inputs.items()
        if key.startswith("earlier_")
    ]
    named = [signed.inputs["documents"] for signed in compared if signed is not None]
    before = [corpus for corpus in corpora if corpus.fingerprint in named]
    return [newest, *before]
