"""Whether a grammar compiles, asked of a process that is killed when it does not find out in time.

The engine compiles what was accepted once more, for its answers. As it does so no faster than
grammars are accepted, and each takes it no longer, other answers never wait long for theirs.
"""

import asyncio
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from serve.errors import ApiError, not_ready, overloaded
from serve.grammar import AT_ONCE, KEPT, LIMITS, Grammar, Limits
from tasks.runtime.killable import ChildDied, ChildTimeout, KillableChild

MAX_GRAMMAR_CHARACTERS = 65_536
SECONDS = 1.0  # a grammar may take; the usual one takes milliseconds
MEGABYTES = 1024  # of the process, its tokenizer included
PATIENCE = 2.0  # seconds a grammar may wait until it is begun
TOO_MUCH = f"compiling it takes more than {SECONDS:g} s or {MEGABYTES} MB; make it simpler"

Key = tuple[str, str, Limits]


class GrammarCheck:
    """Checks grammars for one tokenizer. The processes are started by the first that needs one, and
    end with this one.
    """

    def __init__(self, directory: Path) -> None:
        """directory: of the model."""
        self._directory = directory
        self._threads = ThreadPoolExecutor(AT_ONCE, "grammar-check")
        self._resting: list[KillableChild] = []
        self._known: OrderedDict[Key, str] = OrderedDict()  # its problem, least recent first

    async def check(self, kind: str, text: str, param: str) -> Grammar:
        """kind: "json_schema" or "regex". Raises ApiError: 400 naming `param` for what is no
        grammar or too large a one, 429 when too many others are being compiled.
        """
        if len(text) > MAX_GRAMMAR_CHARACTERS:
            message = f"the grammar has {len(text)} characters, more than {MAX_GRAMMAR_CHARACTERS}"
            raise ApiError(400, message, param=param, code="invalid_value")
        key = (kind, text, LIMITS)
        if (problem := self._known.get(key)) is None:
            try:
                asked = self._threads.submit(self._judged, key, time.monotonic())
            except RuntimeError as error:  # closed
                raise not_ready("the server is shutting down") from error
            problem = await asyncio.wrap_future(asked)
        if problem != TOO_MUCH:  # which depends on what else the machine does
            self._known[key] = problem
            self._known.move_to_end(key)
            if len(self._known) > KEPT:
                self._known.popitem(last=False)
        if problem:
            message = f"not a usable {kind}: {problem}"
            raise ApiError(400, message, param=param, code="invalid_value")
        return Grammar(kind, text, param, LIMITS)

    def close(self) -> None:
        """End the processes."""
        self._threads.shutdown()
        while self._resting:
            self._resting.pop().close()

    def _judged(self, key: Key, since: float) -> str:
        """In a thread: the problem of a grammar that was asked about at `since`."""
        if key in self._known:  # by now
            return self._known[key]
        if time.monotonic() - since > PATIENCE:
            raise overloaded("too many forms are being compiled")
        try:
            child = self._resting.pop()
        except IndexError:
            child = KillableChild("serve.grammar", SECONDS, MEGABYTES, str(self._directory))
        try:
            return _verdict(child, *key)
        finally:
            self._resting.append(child)


def _verdict(child: KillableChild, kind: str, text: str, limits: Limits) -> str:
    head = {"kind": kind, "text": text, "limits": asdict(limits)}
    for _ in range(2):  # what was killed by somebody else answers at the second try
        try:
            return str(child.call(head, b"")["problem"])
        except ChildDied:
            continue
        except ChildTimeout:
            break
    return TOO_MUCH
