"""`gristmill forget`: what must not be in the next corpus, nor, if purged, in an earlier one."""

from __future__ import annotations

import argparse
import time
from typing import Any

from tasks.runtime.errors import UserError
from tasks.runtime.run_pages import forget_reports
from tasks.runtime.settings import Settings
from tasks.state.tombstones import Tombstones

AS_RECORDED = (
    "a payload digest finds pages whose record has it: sha256 in our own crawls, mostly sha1 in "
    "WARC files of others; forget any other document by its address or its id"
)


def forget(settings: Settings, arguments: argparse.Namespace) -> int:
    """Keep an address, a domain or a document out of the next corpus; --purge erases it."""
    from tasks.corpus.erase import erase  # Prefect, which these bring, is slow to import
    from tasks.corpus.same_document import known_ids
    from tasks.corpus.tombstoned import Forgotten, parse

    state = Tombstones(settings.database_url)
    if arguments.list:
        return show(state)
    if arguments.withdraw is not None:
        state.withdraw(arguments.withdraw)
        print(f"tombstone {arguments.withdraw} is withdrawn")
        return 0
    if not arguments.what and not arguments.purge:
        raise UserError("say what to forget: an address, a domain or a digest; or --list")
    for kind, value in [parse(what) for what in arguments.what]:
        values = known_ids(settings, value) if kind == "digest" else [value]
        for one in values:
            stone = state.add(kind, one, arguments.reason)
            print(f"tombstone {stone.id}: {stone.kind} {stone.value}")
        if kind == "digest" and ":" in value:
            print(AS_RECORDED)
    if arguments.purge:
        forgotten, named = Forgotten.standing(settings), set[str]()
        done = erase(settings, forgotten, tell, named)
        touched = sum(result.action == "rewritten" for result in done)
        print(f"erased from {touched} artifacts" if done else "no earlier artifact holds any of it")
        named |= {stone.value for stone in forgotten.stones if stone.kind != "digest"}
        reports = forget_reports(settings, named)
        if reports is None:
            print("Prefect does not answer, and its run pages may quote it: start it, purge again")
        elif reports:
            print(f"{reports} reports on Prefect's run pages quoted it and are deleted")
    print("the next corpus has none of it; what will run again: gristmill plan corpus")
    return 0


def tell(done: Any) -> None:
    documents = f"{done.documents:,} rows" if done.documents else ""
    print(f"  {done.action:<10} {done.stage:<14} {done.fingerprint[:12]:<13} {documents}".rstrip())


def show(state: Tombstones) -> int:
    """Every tombstone, and every artifact that something was erased from."""
    for stone in state.all():
        made = time.strftime("%Y-%m-%d", time.localtime(stone.created))
        standing = "withdrawn" if stone.withdrawn else "stands"
        print(f"{stone.id:<5} {standing:<10} {made}  {stone.kind:<7} {stone.value}  {stone.reason}")
    for erasure in state.erased():
        moment = time.strftime("%Y-%m-%d %H:%M", time.localtime(erasure.begun))
        ended = "" if erasure.finished else "  (interrupted: purge again)"
        print(f"{moment}  {erasure.action} {erasure.stage}/{erasure.fingerprint[:12]}{ended}")
    return 0


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("what", nargs="*", metavar="URL|DOMAIN|DIGEST")
    command.add_argument("--purge", action="store_true", help="erase from earlier artifacts, too")
    command.add_argument("--reason", default="asked for", help="kept with the tombstone")
    command.add_argument("--list", action="store_true", help="show tombstones and erasures")
    command.add_argument("--withdraw", type=int, metavar="N", help="a tombstone counts no longer")
