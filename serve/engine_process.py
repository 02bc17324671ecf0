"""The engine in a process of its own, behind the interface of `model.engine.Engine`.

In one process the engine's thread and the event loop that hands out tokens share an interpreter
lock. Each hardly ever holds it, but a step starts hundreds of operations and a stream is a system
call a token; each lets go of the lock and then waits to be woken when the other has taken it. With
32 streams that made a step 2.3 ms longer, a tenth, on a machine with a core for each thread. Apart,
they meet once a step: one message holds what a step has to tell. A model that is swapped out gives
back all of its memory, its libraries' kernels included, as its process ends.

Between the two goes a pair of sockets that nobody else can reach (`serve.messages`).
"""

import asyncio
import logging
import os
import queue
import select
import socket
import subprocess
import sys
import threading
import uuid
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from model.chat import Tokenizer
from model.engine import (
    ConstraintFactory,
    Core,
    EngineClosed,
    FinishReason,
    Sampling,
    Update,
    load_model,
)
from model.engine.counters import Counters
from model.engine.engine import Listener, require_room
from model.engine.readable import require_readable
from serve.grammar import AT_ONCE as GRAMMARS_AT_ONCE
from serve.grammar import Grammar
from serve.messages import (
    Abort,
    Ask,
    Close,
    Failed,
    Message,
    News,
    Ready,
    Start,
    framed,
    receive,
    send,
)
from serve.specification import EngineOptions
from serve.token_mask import GrammarCompiler

log = logging.getLogger(__name__)

CHECKOUT = Path(__file__).resolve().parents[1]
# Weights on large pages: a step of 30 million float32 parameters takes 4.4 ms instead of 4.9.
ALLOCATOR = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
COUNTED_EVERY = 0.2  # seconds, between looks whether the counters changed
AT_ONCE = 64  # messages heard between two steps


class EngineProcess:
    """An engine elsewhere. As `Engine`, it may be called from any thread; listeners are called in a
    thread of ours, and in the event loop once one is attached.
    """

    def __init__(
        self, directory: Path, options: EngineOptions, version: str = "", draft: Path | None = None
    ) -> None:
        """Load a model directory; returns when it is ready. Raises RuntimeError saying why it
        cannot be.
        """
        self.slots, self.max_waiting = options.slots, options.max_waiting
        ours, theirs = socket.socketpair()
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import main; main({theirs.fileno()})"],
            cwd=CHECKOUT,
            env=os.environ | ALLOCATOR,
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        self._pipe = Connection(ours.detach())
        self._lock = threading.Lock()
        # Guarded by _lock:
        self._listeners: dict[str, Listener] = {}
        self._closed = False
        self._failed = False
        self._when_lost: Callable[[], None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None  # that hears the engine, or will
        self._loop_thread = 0  # where that loop runs
        self._ended = threading.Event()  # nothing more will be heard
        self._ended.set()
        try:
            send(self._pipe, Start(directory, options, version, draft))
            told = receive(self._pipe)
        except (EOFError, OSError):
            told = Failed("the engine's process ended while it loaded the model; its log says why")
        if isinstance(told, Failed):
            self._end(0)
            raise RuntimeError(told.message)
        self.tokenizer = Tokenizer.load(directory)
        self.longest_token = max(map(len, self.tokenizer.token_bytes))  # bytes
        self.context, self.vocabulary = told.context, told.vocabulary
        self.parameters, self._counters = told.parameters, told.counters
        self._read_in_thread()

    def attach(self) -> None:
        """Let the running event loop hear the engine, which spares each token a thread's turn."""
        if self._loop is None:
            self._loop_thread, self._loop = threading.get_ident(), asyncio.get_running_loop()

    def when_lost(self, call: Callable[[], None]) -> None:
        """Call this, in a thread of ours, when the process ends that was not told to."""
        with self._lock:
            self._when_lost = call

    @property
    def pid(self) -> int:
        return self._process.pid

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
        """As `Engine.submit`, with the same errors; a constraint must be a `Grammar`."""
        asks = not embed and sampling.max_tokens != 0
        require_readable(prompt, sampling, self.context, self.vocabulary, asks)
        grammar = sampling.constraint
        assert grammar is None or isinstance(grammar, Grammar)
        id = id or uuid.uuid4().hex
        ask = Ask(id, prompt, replace(sampling, constraint=None), grammar, streamed, embed)
        with self._lock:
            if self._closed or self._failed:
                raise EngineClosed("the engine is shutting down")
            require_room(len(self._listeners), room, self.slots, self.max_waiting)
            if self._loop is not None and self._loop.is_closed():
                self._loop = None
                self._read_in_thread()
            self._listeners[id] = listener
            self._send(ask)
        return id

    def abort(self, id: str) -> None:
        """As `Engine.abort`."""
        with self._lock:
            if id in self._listeners:
                self._send(Abort(id))

    def close(self, timeout: float = 10.0) -> None:
        """As `Engine.close`; the process is killed when it takes longer than `timeout` seconds."""
        with self._lock:
            already, self._closed = self._closed, True
            if not already:
                self._send(Close())
        if self._loop_thread == threading.get_ident():
            while self._hear():
                pass
        self._ended.wait(timeout)
        self._end(timeout)

    @property
    def healthy(self) -> bool:
        return not self._failed and not self._ended.is_set()

    @property
    def idle(self) -> bool:
        """Whether nobody waits for an answer."""
        with self._lock:
            return not self._listeners

    def counters(self) -> Counters:
        """As they were COUNTED_EVERY seconds ago at most."""
        return self._counters

    def _send(self, message: Message) -> None:
        """To a process that has just died nothing is said; the reader finds out and tells all."""
        try:
            send(self._pipe, message)
        except OSError:
            log.info("the engine's process is gone")

    def _read_in_thread(self) -> None:
        self._ended.clear()
        threading.Thread(target=self._read, name="engine-news", daemon=True).start()

    def _read(self) -> None:
        """Pass news on until the process ends, or an event loop takes over."""
        while self._hear():
            if (loop := self._loop) is not None:
                try:
                    loop.call_soon_threadsafe(self._listen_in, loop)
                    return
                except RuntimeError:  # it has ended
                    self._loop = None

    def _listen_in(self, loop: asyncio.AbstractEventLoop) -> None:
        with self._lock:  # nobody sends
            loop.add_reader(self._pipe.fileno(), self._hear)
            os.set_blocking(self._pipe.fileno(), True)  # uvloop makes it other; messages are whole

    def _hear(self) -> bool:
        """Pass one message on; False when there will be no more."""
        try:
            news = receive(self._pipe)
        except (EOFError, OSError):
            self._end_of_news()
            return False
        self._counters = news.counters
        self._publish(news.updates)
        return True

    def _end_of_news(self) -> None:
        if self._loop is not None and self._loop_thread == threading.get_ident():
            self._loop.remove_reader(self._pipe.fileno())
        with self._lock:
            self._failed = not self._closed
            waiting, self._listeners = self._listeners, {}
            lost = self._when_lost if self._failed else None
        if self._failed:
            log.error("the engine's process ended; every request in it ends with an error")
        reason: FinishReason = "error" if self._failed else "abort"
        for id, listener in waiting.items():
            listener([Update(id, "", [], reason, 0, 0)])
        self._ended.set()
        if lost is not None:
            lost()

    def _publish(self, updates: list[Update]) -> None:
        grouped: dict[Listener, list[Update]] = {}
        with self._lock:
            for update in updates:
                take = self._listeners.get if update.finish_reason is None else self._listeners.pop
                if (listener := take(update.id, None)) is not None:
                    grouped.setdefault(listener, []).append(update)
        for listener, news in grouped.items():
            listener(news)

    def _end(self, timeout: float) -> None:
        """Wait for the process, or end it."""
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            self._ended.wait(1)
        self._pipe.close()


class _Server:
    """The process's side: one thread that reads messages between steps, so that a request is in the
    engine as soon as it is read.
    """

    def __init__(self, pipe: Connection, start: Start) -> None:
        self.pipe = pipe
        options = start.options
        torch.set_num_threads(options.threads)
        loaded = load_model(start.directory, device=options.device)
        draft = load_model(start.draft, device=options.device).model if start.draft else None
        self.core = core = Core(
            loaded.model,
            loaded.tokenizer,
            slots=options.slots,
            threads=options.threads,
            version=start.version,
            weights=options.weights,
            speculate=options.speculate,
            deterministic=options.deterministic,
            compiled=options.compiled,
            draft=draft,
        )
        parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
        self.told = self.counters()
        self.ready = Ready(core.config.context, core.vocabulary, parameters, self.told)
        self.grammars = GrammarCompiler(loaded.tokenizer)
        self.compiler = ThreadPoolExecutor(GRAMMARS_AT_ONCE)  # as fast as they are accepted
        self.constraining: set[str] = set()
        self.constrained: queue.SimpleQueue[tuple[Ask, ConstraintFactory | None]]
        self.constrained = queue.SimpleQueue()
        self.signal, self.signalling = os.pipe()  # that something is in `constrained`
        self.incoming = select.poll()
        for descriptor in (pipe.fileno(), self.signal):
            self.incoming.register(descriptor, select.POLLIN)
        self.outgoing = socket.socket(fileno=os.dup(pipe.fileno()))
        self.both = select.poll()
        self.both.register(pipe.fileno(), select.POLLIN | select.POLLOUT)
        self.unheard: deque[Message] = deque()

    def counters(self) -> Counters:
        """As they are now."""
        return replace(self.core.counters, steps_of=list(self.core.counters.steps_of))

    def run(self) -> None:
        """Until told to close, or nobody is there any more."""
        while self.listen():
            if self.core.has_work:
                if updates := self.core.step():
                    self.tell(updates)
            elif self.counters() != self.told:
                self.tell([])
        scheduler = self.core.scheduler
        self.tell(self.core.abort([s.id for s in (*scheduler.waiting, *scheduler.running)]))
        self.core.close()

    def listen(self) -> bool:
        """Hear what has come; where there is nothing to do, wait for it. False: it is to end."""
        patience = 0.0 if self.core.has_work or self.unheard else 1e3 * COUNTED_EVERY
        for _ in range(AT_ONCE):
            came = self.incoming.poll(patience)
            patience = 0
            for descriptor, _ in came:
                if descriptor == self.signal:
                    self.begin_constrained(len(os.read(self.signal, AT_ONCE)))
                else:
                    self.unheard.append(receive(self.pipe))
            if not self.unheard:
                break
            if isinstance(message := self.unheard.popleft(), Close):
                return False
            self.hear(message)
        return True

    def hear(self, message: Message) -> None:
        if isinstance(message, Abort):
            if message.id in self.constraining:
                self.constraining.discard(message.id)
                self.tell([Update(message.id, "", [], "abort", 0, 0)])
            elif updates := self.core.abort([message.id]):
                self.tell(updates)
            return
        assert isinstance(message, Ask)
        if message.grammar is not None:
            self.constraining.add(message.id)
            self.compiler.submit(self.constrain, message)
        else:
            self.begin(message)

    def constrain(self, ask: Ask) -> None:
        """In the compiler's thread."""
        asked, constraint = ask.grammar, None
        assert asked is not None
        try:
            constraint = self.grammars.compile(asked)
        except Exception:  # a pool keeps it to itself, and the answer would wait for ever
            log.exception("a grammar that was checked cannot be compiled")
        self.constrained.put((ask, constraint))
        os.write(self.signalling, b"1")

    def begin_constrained(self, count: int) -> None:
        for _ in range(count):
            ask, constraint = self.constrained.get()
            if ask.id not in self.constraining:
                continue  # aborted meanwhile
            self.constraining.discard(ask.id)
            if constraint is None:
                self.refuse(ask)
            else:
                self.begin(replace(ask, sampling=replace(ask.sampling, constraint=constraint)))

    def begin(self, ask: Ask) -> None:
        try:
            self.core.add(
                self.core.sequence(
                    ask.id, ask.prompt, ask.sampling, streamed=ask.streamed, embed=ask.embed
                )
            )
        except Exception:  # what the other side let pass must not end this side for all
            log.exception("the engine refuses a request that was checked")
            self.refuse(ask)

    def refuse(self, ask: Ask) -> None:
        self.tell([Update(ask.id, "", [], "error", 0, 0)])

    def tell(self, updates: list[Update]) -> None:
        """Updates of one step, or only how much there is to do."""
        self.told = self.counters()
        left = memoryview(framed(News(updates, self.told)))
        while left:
            try:
                left = left[self.outgoing.send(left, socket.MSG_DONTWAIT) :]
            except BlockingIOError:
                # The other side reads nothing while it waits for us to read: so we do.
                if any(event & ~select.POLLOUT for _, event in self.both.poll()):
                    self.unheard.append(receive(self.pipe))


def main(descriptor: int) -> None:
    """Serve one model over a socket that is open already, until its other end closes."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    pipe = Connection(descriptor)
    start = receive(pipe)
    try:
        server = _Server(pipe, start)
    except Exception as error:
        log.exception("%s cannot be loaded", start.directory)
        send(pipe, Failed(str(error) or type(error).__name__))
        return
    send(pipe, server.ready)
    try:
        server.run()
    except (EOFError, OSError):
        pass  # the replica is gone, and with it whoever waited
    except BaseException:
        log.exception("the engine failed; every request in it ends with an error")
    # Threads inside torch, which have nobody left to answer, must not hold up the end.
    os._exit(0)
