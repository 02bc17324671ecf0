"""From the engine to event loops: one hand-over a step, not one a request."""

import asyncio
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress

from model.engine import Sampling, Update
from serve.engine_process import EngineProcess

END_SECONDS = 10.0  # how long an engine may take to say what an aborted answer came to


class Mailbox:
    """Routes the updates of engines to the coroutines that wait for them."""

    def __init__(self) -> None:
        self._mails: dict[str, Mail] = {}

    @contextmanager
    def open(
        self,
        engine: EngineProcess,
        requests: list[tuple[list[int], Sampling]],
        *,
        streamed: bool,
        embed: bool = False,
    ) -> Iterator["Mail"]:
        """Submit the sequences of one request; on leaving, those unfinished are aborted unheard.

        Raises what `Engine.submit` raises, and then none of them is left running.
        """
        mail = Mail(engine)
        engine.attach()
        try:
            for index, (prompt, sampling) in enumerate(requests):
                id = uuid.uuid4().hex
                mail.indices[id] = index
                mail.unfinished.add(id)
                self._mails[id] = mail
                engine.submit(
                    prompt,
                    sampling,
                    self._publish,
                    streamed=streamed,
                    embed=embed,
                    room=len(requests) if index == 0 else 0,
                    id=id,
                )
            yield mail
        finally:
            for id in mail.unfinished:
                engine.abort(id)
            for id in mail.indices:
                del self._mails[id]

    def _publish(self, updates: list[Update]) -> None:
        """In the loop or the thread that hears the engine."""
        running = asyncio._get_running_loop()
        news: dict[asyncio.AbstractEventLoop, list[tuple[Mail, Update]]] = defaultdict(list)
        for update in updates:
            if mail := self._mails.get(update.id):
                news[mail.loop].append((mail, update))
        for loop, deliveries in news.items():
            if loop is running:
                _deliver(deliveries)
                continue
            with suppress(RuntimeError):  # the loop has ended, and nobody waits any more
                loop.call_soon_threadsafe(_deliver, deliveries)


class Mail:
    """The updates of one request's sequences. `indices`: sequence id → index in the request."""

    def __init__(self, engine: EngineProcess) -> None:
        self.engine = engine
        self.loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[Update] = asyncio.Queue()
        self.indices: dict[str, int] = {}
        self.unfinished: set[str] = set()

    async def updates(self) -> AsyncIterator[tuple[int, Update]]:
        """(index, update) as they come, until every sequence has finished."""
        while self.unfinished:
            update = await self.queue.get()
            if update.finish_reason is not None:
                self.unfinished.discard(update.id)
            yield self.indices[update.id], update

    async def end(self) -> list[tuple[int, Update]]:
        """Abort what is unfinished; what is heard of it until its end, which may be too late."""
        for id in self.unfinished:
            self.engine.abort(id)
        heard = []
        with suppress(TimeoutError):
            async with asyncio.timeout(END_SECONDS):
                async for news in self.updates():
                    heard.append(news)
        return heard


def _deliver(deliveries: list[tuple[Mail, Update]]) -> None:
    for mail, update in deliveries:
        mail.queue.put_nowait(update)
