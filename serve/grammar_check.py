"""Whether a grammar compiles, asked of a process that is killed when it does not find out in time.

The engine compiles what was accepted once more, for its answers. As it does so no faster than
grammars are accepted, and each takes it no longer, other answers never wait long for theirs.
"""

import asyncio
import logging
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from serve.errors import ApiError, not_ready, overloaded
from serve.grammar import AT_ONCE, LIMITS, Grammar, Limits
from tasks.runtime.killable import ChildDied, ChildTimeout, KillableChild, NeverBegan

log = logging.getLogger(__name__)

MAX_GRAMMAR_CHARACTERS = 65_536
REMEMBERED = 256  # verdicts: twice the tools of a request
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
        self._children: list[KillableChild] = []  # all, of which these have nothing to do:
        self._resting: list[KillableChild] = []
        self._closed = False
        self._known: OrderedDict[Key, str] = OrderedDict()  # its problem, least recent first

    async def check(self, kind: str, text: str, param: str) -> Grammar:
        """kind: as a `Grammar` has it. Raises ApiError: 400 naming `param` for what is no
        grammar or too large a one, 429 when too many others are being compiled, 503 when none can
        be compiled.
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
            if len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        if problem:
            message = f"not a usable {kind}: {problem}"
            raise ApiError(400, message, param=param, code="invalid_value")
        return Grammar(kind, text, param, LIMITS)

    def close(self) -> None:
        """End the processes."""
        self._closed = True
        self._threads.shutdown(wait=False)  # those that wait are told
        for child in self._children:
            child.kill()
        self._threads.shutdown()
        for child in self._children:
            child.close()

    def _judged(self, key: Key, since: float) -> str:
        """In a thread: the problem of a grammar that was asked about at `since`."""
        if (problem := self._known.get(key)) is not None:  # by now
            return problem
        if time.monotonic() - since > PATIENCE:
            raise overloaded("too many forms are being compiled")
        try:
            child = self._resting.pop()
        except IndexError:
            child = KillableChild("serve.grammar", SECONDS, MEGABYTES, str(self._directory))
            self._children.append(child)
        try:
            return self._verdict(child, *key)
        finally:
            self._resting.append(child)

    def _verdict(self, child: KillableChild, kind: str, text: str, limits: Limits) -> str:
        head = {"kind": kind, "text": text, "limits": asdict(limits)}
        for again in (True, False):  # what somebody else killed answers at the second try
            if self._closed:
                raise not_ready("the server is shutting down")
            try:
                return str(child.call(head, b"")["problem"])
            except NeverBegan as death:
                if not again:
                    log.error("the compiler of forms ends at once, with status %s", death.args[0])
                    raise not_ready("forms cannot be compiled now; see the server's log") from None
            except ChildDied:
                continue
            except ChildTimeout:
                break
        return TOO_MUCH
