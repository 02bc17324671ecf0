"""The engine behind a thread: submit and abort from anywhere, updates by callback.

One thread owns torch and every structure of `Core`. Others reach it through an inbox, and an
event loop never waits for it.
"""

import atexit
import functools
import logging
import threading
import uuid
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from model.chat import Tokenizer
from model.engine.core import Core
from model.engine.counters import Counters
from model.engine.sampling import Sampling
from model.engine.sequence import FinishReason, Sequence, Update
from model.transformer import Transformer

log = logging.getLogger(__name__)

Listener = Callable[[list[Update]], None]
"""Called in the engine's thread with the news of one step; must return at once and not raise."""


class EngineBusy(RuntimeError):
    """Too many sequences wait already; ask again later."""


def require_room(held: int, room: int, slots: int, max_waiting: int) -> None:
    """Raise EngineBusy unless a request of `room` answers may be added to the `held` ones. One that
    meets no other may bring any number: requests after it are refused, not kept waiting.
    """
    if room and held and held + room > slots + max_waiting:
        if room == 1:
            raise EngineBusy(f"{max_waiting} requests are waiting already")
        raise EngineBusy(
            f"{room} answers do not fit beside the {held} under way ({slots + max_waiting} at most)"
        )


class EngineClosed(RuntimeError):
    """The engine takes no more sequences."""


class Engine:
    """Continuous batching of one model.

    slots: sequences in a batch at most. max_waiting: sequences that may queue for a slot: as many
    as slots, and who is admitted waits for one other answer at most. threads:
    cores torch may use; one is best for models of a few million parameters on a shared machine,
    where a second thread's barriers cost more than its arithmetic saves. options: those of `Core`.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        slots: int = 32,
        max_waiting: int = 32,
        prefill_tokens: int = 1024,
        threads: int = 1,
        **options: Any,
    ) -> None:
        self.tokenizer = tokenizer
        self.context = model.config.context
        self.longest_token = max(map(len, tokenizer.token_bytes))  # bytes
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.slots = slots
        self.max_waiting = max_waiting
        self.threads = threads
        self._core = Core(
            model,
            tokenizer,
            slots=slots,
            prefill_tokens=prefill_tokens,
            threads=threads,
            **options,
        )
        self._changed = threading.Condition()
        # Guarded by _changed:
        self._inbox: list[Sequence] = []
        self._aborts: list[str] = []
        self._listeners: dict[str, Listener] = {}
        self._closed = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        # A daemon thread that the interpreter kills inside torch takes the process down with it.
        self._at_exit = functools.partial(_close_at_exit, weakref.ref(self))
        atexit.register(self._at_exit)
        self._thread.start()

    def submit(
        self,
        prompt: list[int],
        sampling: Sampling,
        listener: Listener,
        *,
        streamed: bool = True,
        embed: bool = False,
        room: int = 1,
        id: str | None = None,
    ) -> str:
        """Queue a prompt and return the id of its sequence; a given `id` must be new.

        streamed: report as it grows; else only the finished answer. embed: see `Core.sequence`. The
        last update has a `finish_reason`. room: of how many answers the request is the first, which
        must all fit; 0 for its later ones. Raises PromptError, EngineBusy or EngineClosed.
        """
        id = id or uuid.uuid4().hex
        sequence = self._core.sequence(id, prompt, sampling, streamed=streamed, embed=embed)
        with self._changed:
            if self._closed or self._failure:
                raise EngineClosed("the engine is shutting down")
            counters = self._core.counters
            held = len(self._inbox) + counters.requests - counters.ended
            # Who will find a free slot does not wait, even if the step is not over that admits it.
            require_room(held, room, self.slots, self.max_waiting)
            self._inbox.append(sequence)
            self._listeners[sequence.id] = listener
            self._changed.notify()
        return sequence.id

    def abort(self, id: str) -> None:
        """Stop a sequence and free its slot; its listener soon hears of the end. Harmless when
        finished.
        """
        with self._changed:
            if id in self._listeners:
                self._aborts.append(id)
                self._changed.notify()

    def close(self, timeout: float = 10.0) -> None:
        """Take no more, end what is under way with finish_reason "abort", and stop the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout)
        self._core.close()
        atexit.unregister(self._at_exit)

    @property
    def healthy(self) -> bool:
        return self._thread.is_alive() and self._failure is None

    @property
    def idle(self) -> bool:
        """Whether nobody waits for an answer."""
        with self._changed:
            return not self._listeners and not self._inbox

    @property
    def vocabulary(self) -> int:
        """Ids that a prompt may hold are below it."""
        return self._core.vocabulary

    def counters(self) -> Counters:
        counters = self._core.counters
        return replace(counters, steps_of=list(counters.steps_of))

    def check(self) -> None:
        """Raise AssertionError when slots and sequences do not match; for tests, on an idle
        engine.
        """
        self._core.check()

    def _run(self) -> None:
        torch.set_num_threads(self.threads)  # counts per thread, so that others keep theirs
        try:
            while self._turn():
                pass
        except BaseException as error:
            log.exception("the engine failed; every request in it ends with an error")
            self._failure = error
            self._end_all("error")

    def _turn(self) -> bool:
        """Wait for work, do one step of it. False when closed."""
        with self._changed:
            while not (self._inbox or self._aborts or self._closed or self._core.has_work):
                self._changed.wait()
            arrived, self._inbox = self._inbox, []
            aborts, self._aborts = self._aborts, []
            closed = self._closed
            for sequence in arrived:  # before anybody else asks how many wait
                self._core.add(sequence)
        if aborts:
            self._publish(self._core.abort(aborts))
        if closed:
            self._end_all("abort")
            return False
        if self._core.has_work:
            self._publish(self._core.step())
        return True

    def _end_all(self, reason: FinishReason) -> None:
        with self._changed:
            arrived, self._inbox = self._inbox, []
        for sequence in arrived:
            self._core.add(sequence)
        scheduler = self._core.scheduler
        everyone = [s.id for s in (*scheduler.waiting, *scheduler.running)]
        self._publish(self._core.abort(everyone, reason))

    def _publish(self, updates: list[Update]) -> None:
        """Hand updates to their listeners, those of one listener together."""
        grouped: dict[Listener, list[Update]] = {}
        with self._changed:
            for update in updates:
                take = self._listeners.get if update.finish_reason is None else self._listeners.pop
                listener = take(update.id, None)
                if listener is not None:
                    grouped.setdefault(listener, []).append(update)
        for listener, news in grouped.items():
            listener(news)


def _close_at_exit(engine: "weakref.ref[Engine]") -> None:
    if (alive := engine()) is not None:
        alive.close()
