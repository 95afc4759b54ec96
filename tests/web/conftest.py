"""A small application behind the listener that both servers use."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from nat_plugin_evsys.errors import ClientGone, Refusal
from nat_plugin_evsys.web.json_bodies import read_json
from nat_plugin_evsys.web.listen import bind, listen, url_of


async def _healthz(request: Request) -> Response:
    return JSONResponse({"status": "ok"})


async def _read(request: Request) -> Response:
    try:
        body, _ = await read_json(request)
    except Refusal as refusal:
        return JSONResponse({"error": str(refusal)}, status_code=refusal.status)
    except ClientGone:
        return Response(status_code=499)
    return JSONResponse({"bytes": len(body)})


async def _held(request: Request) -> Response:
    await asyncio.sleep(3)
    return JSONResponse({"held": True})


@pytest.fixture
def url() -> Iterator[str]:
    """Of a running server: GET /healthz, POST /read (a JSON object), GET /held (three seconds)."""
    routes = [
        Route("/healthz", _healthz),
        Route("/read", _read, methods=["POST"]),
        Route("/held", _held),
    ]
    listener, started = bind("127.0.0.1", 0, advice=""), threading.Event()
    place = url_of("127.0.0.1", listener.getsockname()[1])
    server = listen(Starlette(routes=routes), listener, started.set)
    thread = threading.Thread(target=lambda: asyncio.run(server.run()), daemon=True)
    thread.start()
    assert started.wait(30)
    yield place
    server.stop(at_once=True)
    thread.join(30)
