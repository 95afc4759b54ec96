"""Calls of a vLLM server, from any thread and event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from nat_plugin_evsys.errors import EngineClosedError, ServiceError, ServiceUnavailableError
from nat_plugin_evsys.loop_thread import LoopThread

_CONNECT_SECONDS, _ANSWER_SECONDS = 10.0, 3600.0
_MESSAGE_CHARACTERS = 300


class VllmApi:
    """One server. Its connections live in a loop of their own, since a policy is asked from several.

    Args:
        url: without ``/v1``.
        key: None: the server has none.
    """

    def __init__(self, url: str, key: str | None) -> None:
        self.url = url
        self._loop = LoopThread("evsys-vllm")
        self._client = httpx.AsyncClient(
            base_url=url,
            headers={} if key is None else {"Authorization": f"Bearer {key}"},
            timeout=httpx.Timeout(_ANSWER_SECONDS, connect=_CONNECT_SECONDS, pool=None),
            limits=httpx.Limits(max_connections=None),
            trust_env=False,
        )

    async def complete(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The answer of ``/v1/completions``. Cancelling the awaiting task ends the request on the server too.

        Raises:
            ServiceUnavailableError: the server cannot be reached, or the connection has been closed.
            ServiceError: it refused or failed.
        """
        answer: dict[str, Any] = (await self._post("/v1/completions", body)).json()
        return answer

    async def load_adapter(self, name: str, directory: Path) -> None:
        """Let ``name`` stand for the adapter in ``directory``, which the server must see. Raises as ``complete``."""
        await self._post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(directory)})

    async def unload_adapter(self, name: str) -> None:
        """Forget the adapter. Raises as ``complete``."""
        await self._post("/v1/unload_lora_adapter", {"lora_name": name})

    def close(self) -> None:
        """Fail requests in flight, end the connections and the thread. Idempotent."""
        self._loop.close(self._client.aclose)

    async def _post(self, path: str, body: Mapping[str, Any]) -> httpx.Response:
        try:
            response = await asyncio.wrap_future(self._loop.run(self._sent(path, body)))
        except EngineClosedError:
            raise _closed_error() from None
        except httpx.HTTPError as error:
            raise ServiceUnavailableError(
                f"vLLM at {self.url} cannot be reached: {type(error).__name__} {error}".rstrip()
            ) from error
        if response.status_code != httpx.codes.OK:
            said = response.text[:_MESSAGE_CHARACTERS]
            raise ServiceError(f"vLLM at {self.url} answered {response.status_code} to {path}: {said}")
        return response

    async def _sent(self, path: str, body: Mapping[str, Any]) -> httpx.Response:
        """One request, in the loop of the connections."""
        try:
            return await self._client.post(path, json=dict(body))
        except asyncio.CancelledError:
            if self._loop.closed:
                raise _closed_error() from None
            raise


def _closed_error() -> ServiceUnavailableError:
    return ServiceUnavailableError("the connection to vLLM has been closed")
