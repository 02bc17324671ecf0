"""Models as `/v1/models` shows them: OpenAI's fields, then where the model comes from."""

from collections.abc import Sequence
from typing import Any

from serve.host import ServedModel


def cards(served: Sequence[ServedModel]) -> list[dict[str, Any]]:
    """One card a name, the main version behind it; each version under its own name as well, when
    there are several.
    """
    main = {one.spec.name: one for one in reversed(served)}
    found = [card(one, name) for name, one in reversed(main.items())]
    if len(served) > 1:
        found += [card(one, one.spec.names[0]) for one in served]
    return found


def card(served: ServedModel, name: str) -> dict[str, Any]:
    """A served version under one of its names."""
    spec = served.spec
    return {
        "id": name,
        "object": "model",
        "created": int(served.since),
        "owned_by": "gristmill",
        "max_model_len": served.engine.context,
        "calls_tools": served.calls_tools,
        "version": spec.version,
        "aliases": spec.aliases,
        "share": spec.share,
        "system_fingerprint": spec.system_fingerprint,
        "artifact": spec.artifact,
        "parameters": served.engine.parameters,
        "title": spec.title,
        "corpus": spec.corpus,
        "examples": spec.examples,
        "lineage": spec.lineage,
        "scores": spec.scores,
    }
