"""`gristmill sequence`: the text of a stretch of training data, as a stopped training names it."""

from __future__ import annotations

import argparse

from tasks.runtime.errors import UserError
from tasks.runtime.settings import Settings

STAGES = ("token-shards", "pairs", "conversations")


def sequence(settings: Settings, arguments: argparse.Namespace) -> int:
    """Show the documents, or the questions and answers, of a stretch of training data."""
    from model.loader import Place  # brings torch
    from tasks.runtime.store import Store
    from tasks.tokenizer.sequence_text import passages

    stage, _, mark = arguments.artifact.partition("/")
    if stage not in STAGES or not mark:
        raise UserError(
            f"{arguments.artifact!r} is neither {' nor '.join(f'{s}/FINGERPRINT' for s in STAGES)}"
        )
    store = Store.open(settings)
    place = Place(arguments.file, arguments.start, arguments.count)
    for passage in passages(store, store.get(stage, mark), place):
        named = " ".join(word for word in (passage.document, passage.address) if word)
        print(f"== {named or 'unknown, as its corpus is not in the store any more'}")
        print(passage.text)
    return 0


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("artifact", help=f"{' or '.join(STAGES)}/FINGERPRINT")
    command.add_argument("file", help="one of its files, such as tokens-00000.npy")
    command.add_argument("start", type=int, help="its first token, or row of a table")
    command.add_argument("--count", type=int, default=1, metavar="N", help="of tokens or rows")
