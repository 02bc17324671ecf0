"""What stands between HTTP and a completion: bodies with a limit, streams that notice a
disconnect.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serve.errors import ApiError

MAX_BODY_BYTES = 1 << 20
BODY_SECONDS = 10.0
T = TypeVar("T")
CLOSING: set[asyncio.Future[None]] = set()
"""Requests that clear up; the loop itself holds tasks but weakly."""


async def read_body(request: Request) -> bytes:
    """The body of a JSON request.

    Raises ApiError: 415 for another content type, 413 beyond MAX_BODY_BYTES (without reading on),
    408 when it does not arrive within BODY_SECONDS.
    """
    content_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if content_type != "application/json":
        raise ApiError(415, f"Content-Type is {content_type or 'missing'!r}; send application/json")
    too_large = ApiError(413, f"the body is larger than {MAX_BODY_BYTES} bytes; send less")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > MAX_BODY_BYTES:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for block in request.stream():
                body += block
                if len(body) > MAX_BODY_BYTES:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {BODY_SECONDS:.0f} s") from None
    return bytes(body)


async def unless_disconnected(
    request: Request, work: Coroutine[Any, Any, T], on_close: Callable[[], None] | None = None
) -> T:
    """The result of `work`, which is cancelled when the client goes away (ClientDisconnect).

    `on_close` is called when the work is over, which may be later than this.
    """
    task = asyncio.ensure_future(work)
    if on_close is not None:
        task.add_done_callback(lambda _: on_close())
    gone = asyncio.ensure_future(_disconnect(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        await _sheltered(_cancel(task, gone))


class EventStream(Response):
    """A response of server-sent events (ASGI).

    `first` has been drawn from `events` already. However the response ends (by itself, by a
    client that goes away between two events, by the server's cancellation), the generator is
    closed, its `finally` has run and `on_close` is called before it is over.
    """

    def __init__(
        self,
        first: bytes,
        events: AsyncGenerator[bytes, None],
        headers: dict[str, str],
        on_close: Callable[[], None],
    ) -> None:
        self._first = first
        self._events = events
        self._on_close = on_close
        super().__init__(media_type="text/event-stream; charset=utf-8", headers=headers)
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-cache"
        self.headers["x-accel-buffering"] = "no"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        pump = asyncio.ensure_future(self._pump(send))
        gone = asyncio.ensure_future(_disconnect(receive))
        try:
            await asyncio.wait({pump, gone}, return_when=asyncio.FIRST_COMPLETED)
            if pump.done():
                with suppress(OSError):  # what servers raise when the client is gone
                    pump.result()
        finally:
            await _sheltered(self._close(pump, gone))

    async def _close(self, *tasks: asyncio.Future[Any]) -> None:
        try:
            await _cancel(*tasks)
            await self._events.aclose()
        finally:
            self._on_close()

    async def _pump(self, send: Send) -> None:
        await send(
            {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        )
        await send({"type": "http.response.body", "body": self._first, "more_body": True})
        async for event in self._events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _disconnect(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _sheltered(work: Coroutine[Any, Any, None]) -> None:
    """Ray cancels the request of a client that left, and may do so while we clear up."""
    closing = asyncio.ensure_future(work)
    CLOSING.add(closing)
    closing.add_done_callback(CLOSING.discard)
    await asyncio.shield(closing)


async def _cancel(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
