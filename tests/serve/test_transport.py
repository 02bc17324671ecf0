"""A stream gives back what it holds, however it ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest
from starlette.requests import ClientDisconnect

from serve.transport import EventStream, unless_disconnected


@pytest.mark.parametrize("cancels", [1, 2, 3])
def test_a_request_cancelled_again_while_it_clears_up_is_cleared_up_all_the_same(
    cancels: int,
) -> None:
    ended: list[str] = []

    async def events() -> AsyncGenerator[bytes, None]:
        try:
            yield b"first"
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0)
            ended.append("events")

    async def never() -> dict[str, str]:
        await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    async def send(message: object) -> None:
        return None

    async def run() -> None:
        generator = events()
        stream = EventStream(await anext(generator), generator, {}, lambda: ended.append("lease"))
        request = asyncio.create_task(stream({"type": "http"}, never, send))
        await asyncio.sleep(0.01)
        for _ in range(cancels):
            request.cancel()
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await request
        await asyncio.sleep(0.05)

    asyncio.run(run())
    assert ended == ["events", "lease"]


@pytest.mark.parametrize("cancels", [0, 1, 2, 3])
def test_work_that_is_cancelled_again_says_all_the_same_what_it_came_to(cancels: int) -> None:
    ended: list[str] = []

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.01)
            ended.append("counted")

    class Leaving:
        async def receive(self) -> dict[str, str]:
            await asyncio.sleep(60 if cancels else 0.01)
            return {"type": "http.disconnect"}

    async def run() -> None:
        request = asyncio.create_task(
            unless_disconnected(Leaving(), work(), lambda: ended.append("charged"))
        )
        await asyncio.sleep(0.01)
        for _ in range(cancels):
            request.cancel()
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError if cancels else ClientDisconnect):
            await request
        await asyncio.sleep(0.05)

    asyncio.run(run())
    assert ended == ["counted", "charged"]
