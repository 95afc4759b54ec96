"""The connection to a vLLM server: what waits for an answer when it is closed fails at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from nat_plugin_evsys.backends.vllm.api import VllmApi
from nat_plugin_evsys.errors import ServiceUnavailableError


class Silent:
    """A server that takes requests and never answers."""

    def __init__(self) -> None:
        self.url = ""
        self.asked, self.left = asyncio.Event(), asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        self.asked.set()
        while await reader.read(1024):
            pass
        self.left.set()
        writer.close()


@pytest_asyncio.fixture
async def silent() -> AsyncIterator[Silent]:
    found = Silent()
    async with await asyncio.start_server(found.serve, "127.0.0.1", 0) as server:
        found.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        yield found


async def test_closing_fails_the_requests_in_flight(silent: Silent) -> None:
    api = VllmApi(silent.url, None)
    asking = asyncio.ensure_future(api.complete({}))
    await asyncio.wait_for(silent.asked.wait(), 10)
    await asyncio.to_thread(api.close)
    with pytest.raises(ServiceUnavailableError, match="has been closed"):
        await asyncio.wait_for(asking, 10)
    await asyncio.wait_for(silent.left.wait(), 10)
    api.close()
    with pytest.raises(ServiceUnavailableError, match="has been closed"):
        await api.complete({})


async def test_cancelling_ends_the_request_on_the_server(silent: Silent) -> None:
    api = VllmApi(silent.url, None)
    asking = asyncio.ensure_future(api.complete({}))
    await asyncio.wait_for(silent.asked.wait(), 10)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    await asyncio.wait_for(silent.left.wait(), 10)
    await asyncio.to_thread(api.close)
