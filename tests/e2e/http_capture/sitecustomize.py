"""Captures every chat completion of a process at the HTTP client's transport, knowing nothing of the plugin.

Put this directory on PYTHONPATH and name a file in EVSYS_TEST_HTTP_CAPTURE. The capture asks for token ids (vLLM's
``return_token_ids``) in each request, and writes one JSON line per exchange.
"""

import importlib
import json
import os
import threading

TARGET = os.environ.get("EVSYS_TEST_HTTP_CAPTURE")
_lock = threading.Lock()


def _write(record):
    with _lock, open(TARGET, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def _patch(module_name):
    try:
        httpx = importlib.import_module(module_name)
    except ImportError:
        return
    plain, plain_async = httpx.HTTPTransport.handle_request, httpx.AsyncHTTPTransport.handle_async_request

    class Tee(httpx.SyncByteStream, httpx.AsyncByteStream):
        def __init__(self, stream, finish):
            self._stream, self._finish, self._parts = stream, finish, []

        def __iter__(self):
            for part in self._stream:
                self._parts.append(part)
                yield part

        async def __aiter__(self):
            async for part in self._stream:
                self._parts.append(part)
                yield part

        def close(self):
            self._stream.close()
            self._finish(b"".join(self._parts))

        async def aclose(self):
            await self._stream.aclose()
            self._finish(b"".join(self._parts))

    def asking_for_ids(request, content):
        body = {**json.loads(content), "return_token_ids": True}
        headers = [(k, v) for k, v in request.headers.items() if k.lower() != "content-length"]
        asked = httpx.Request(request.method, request.url, headers=headers, json=body, extensions=request.extensions)
        return asked, body

    def captured(response, request, body):
        def finish(raw):
            _write(
                {
                    "url": str(request.url),
                    "headers": {k.lower(): v for k, v in request.headers.items()},
                    "request": body,
                    "status": response.status_code,
                    "response": raw.decode("utf-8"),
                }
            )

        response.stream = Tee(response.stream, finish)
        return response

    def handle(self, request):
        if not request.url.path.endswith("/chat/completions"):
            return plain(self, request)
        asked, body = asking_for_ids(request, request.read())
        return captured(plain(self, asked), request, body)

    async def handle_async(self, request):
        if not request.url.path.endswith("/chat/completions"):
            return await plain_async(self, request)
        asked, body = asking_for_ids(request, await request.aread())
        return captured(await plain_async(self, asked), request, body)

    httpx.HTTPTransport.handle_request = handle
    httpx.AsyncHTTPTransport.handle_async_request = handle_async


if TARGET:
    for name in ("httpx", "httpx2"):
        _patch(name)
