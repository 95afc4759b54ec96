"""A loop in a thread: what runs when it is closed ends, and knows why."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import CancelledError, Future

import pytest

from nat_plugin_evsys.errors import EngineClosedError
from nat_plugin_evsys.loop_thread import LoopThread


def test_closing_cancels_what_runs_and_then_awaits_the_last() -> None:
    loop, seen = LoopThread("test-loop"), []

    async def forever() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            seen.append(("cancelled", loop.closed))

    async def last() -> None:
        seen.append(("last", loop.closed))

    futures: list[Future[None]] = [loop.run(forever()) for _ in range(2)]
    loop.close(last)
    loop.close(last)
    assert seen == [("cancelled", True), ("cancelled", True), ("last", True)]
    for future in futures:
        with pytest.raises(CancelledError):
            future.result(timeout=5)
    with pytest.raises(EngineClosedError, match="test-loop has been closed"):
        loop.run(last())


def test_it_ends_where_the_last_call_fails() -> None:
    loop = LoopThread("test-loop")

    async def last() -> None:
        raise OSError("the connection was closed already")

    with pytest.raises(OSError, match="closed already"):
        loop.close(last)
    assert "test-loop" not in [thread.name for thread in threading.enumerate()]


def test_a_future_that_is_cancelled_cancels_its_coroutine() -> None:
    loop, ended = LoopThread("test-loop"), Future[bool]()

    async def forever() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            ended.set_result(loop.closed)

    async def begun() -> None:
        pass

    future = loop.run(forever())
    loop.run(begun()).result(timeout=5)
    future.cancel()
    assert ended.result(timeout=5) is False
    loop.close()
