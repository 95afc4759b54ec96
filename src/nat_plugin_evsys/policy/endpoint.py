"""The policy endpoint: an OpenAI-compatible server in this process, on its own thread and event loop."""

from __future__ import annotations

import asyncio
import hmac
import secrets
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING
from urllib.parse import quote

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from nat_plugin_evsys.calls import RunKind
from nat_plugin_evsys.errors import ApiError, EvsysError
from nat_plugin_evsys.policy.attribution import CALL_ATTRIBUTION
from nat_plugin_evsys.policy.chat import ChatRenderer
from nat_plugin_evsys.policy.chat_routes import FUNCTIONS, ROLLOUT, ChatRoutes, error_response
from nat_plugin_evsys.policy.completions import PolicySource, check_model
from nat_plugin_evsys.policy.history import History
from nat_plugin_evsys.policy.recorder import Recorder
from nat_plugin_evsys.policy.sampling import SamplingDefaults
from nat_plugin_evsys.web.origin import refuse_web_pages

if TYPE_CHECKING:
    from nat_plugin_evsys.backends.base import SamplingClient
    from nat_plugin_evsys.config.policy import HintMode
    from nat_plugin_evsys.web.listen import HttpServer

__all__ = ["PolicyEndpoint", "SamplingDefaults"]

_START_SECONDS = 30.0
_CLOSE_SECONDS = 10.0


class PolicyEndpoint:
    """``POST /v1/chat/completions``, ``/completions`` and ``/responses``, vLLM's ``POST /tokenize`` and
    ``/inference/v1/generate``, ``GET /v1/models`` and ``GET /health`` for the policy.

    ``/rollouts/ROLLOUT/v1/…`` is the same for the calls of one rollout (see ``url_of``).

    Args:
        renderer: gives the chat renderer; called for each request, may be async and may load the model.
        sampling_client: gives the client of the policy version to sample from; called for each request, so a new
            version takes effect at the next one while calls in flight finish on theirs.
        recorder: keeps the calls.
        defaults: sampling settings of requests that do not set them, by the kind of their run.
        model_names: the names that requests may ask for.
        is_alias: tells other names by which it may be asked for.
        hints: what becomes of requests that ask for a form of the reply (see ``ChatCompletionRequest.hints``).
        held_client: the client that rollouts sample from while they are held at one policy version; None while they
            are not.
        port: 0 takes a free one.
        api_key: default is a generated one.
    """

    def __init__(
        self,
        *,
        renderer: Callable[[], ChatRenderer | Awaitable[ChatRenderer]],
        sampling_client: Callable[[], SamplingClient | Awaitable[SamplingClient]],
        recorder: Recorder,
        defaults: Callable[[RunKind | None], SamplingDefaults],
        model_names: list[str],
        is_alias: Callable[[str], bool] = lambda name: False,
        held_client: Callable[[], SamplingClient | None] = lambda: None,
        hints: HintMode = "honour",
        host: str = "127.0.0.1",
        port: int = 0,
        api_key: str | None = None,
    ) -> None:
        self.api_key = api_key or f"sk-evsys-{secrets.token_urlsafe(24)}"
        history = History()
        source = PolicySource(renderer, sampling_client, recorder, defaults, held_client, hints, history)
        recorder.when_closed(lambda run_id: history.forget(source.scope_of(run_id)))
        models = _OnePolicy(source, list(model_names), is_alias, self.api_key)
        self._routes = ChatRoutes(models, recorder, self._is_closing)
        self._host, self._port = host, port
        self._url: str | None = None
        self._address: tuple[str, int] | None = None
        self._server: HttpServer | None = None
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closing: asyncio.Event | None = None

    # -- life -------------------------------------------------------------------------------------------------------

    @property
    def base_url(self) -> str:
        """``http://HOST:PORT/v1``.

        Raises:
            EvsysError: the endpoint has not been started.
        """
        return self.url_of(None)

    def url_of(self, rollout: str | None, functions: str | None = None) -> str:
        """``base_url``, or one whose calls belong to a rollout where they do not say another: for any client at all.

        Args:
            functions: the functions that the calls are made in, as their header has them.

        Raises:
            EvsysError: the endpoint has not been started.
        """
        if self._url is None:
            raise EvsysError("the policy endpoint is not running; call start() first")
        if rollout is None:
            return f"{self._url}/v1"
        within = f"/in/{quote(functions)}" if functions else ""
        return f"{self._url}/rollouts/{quote(rollout)}{within}/v1"

    def start(self) -> None:
        """Listen; returns once requests are answered. Does nothing if it is already running.

        Raises:
            ConfigError: it cannot listen on the address.
            EvsysError: the server did not come up.
        """
        if self._thread is not None:
            return
        from nat_plugin_evsys.web.listen import bind, listen, url_of

        advice = "set another `port` of the evsys_policy LLM, or 0 for a free one"
        listener, started = bind(self._host, self._port, advice=advice), threading.Event()
        port = listener.getsockname()[1]
        self._server = listen(self._app(), listener, started.set)
        self._thread = threading.Thread(target=self._serve, args=(self._server,), name="evsys-endpoint", daemon=True)
        self._thread.start()
        deadline = time.monotonic() + _START_SECONDS
        while not started.wait(0.05):
            if not self._thread.is_alive() or time.monotonic() > deadline:
                listener.close()
                self.close()
                raise EvsysError(f"the policy endpoint did not start on {self._host}:{port}; see the log")
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self._host, self._host)  # noqa: S104 - compared, not bound
        self._url, self._address = url_of(host, port), (host, port)

    def attribute_calls(self) -> None:
        """Let calls that this process makes from now on say which rollout they belong to; see ``CallAttribution``."""
        if self._address is not None:
            CALL_ATTRIBUTION.add(self._address)

    def close(self) -> None:
        """Stop listening. Requests in flight are answered 503 and their sampling is cancelled."""
        thread, server = self._thread, self._server
        self._thread = self._server = self._url = None
        if self._address is not None:
            CALL_ATTRIBUTION.remove(self._address)
            self._address = None
        if thread is None or server is None:
            return
        server.stop()
        if self._loop is not None and self._closing is not None:
            with suppress(RuntimeError):  # its loop may have ended already
                self._loop.call_soon_threadsafe(self._closing.set)
        if thread is not threading.current_thread():
            thread.join(_CLOSE_SECONDS)

    def _serve(self, server: HttpServer) -> None:
        async def serve() -> None:
            self._loop, self._closing = asyncio.get_running_loop(), asyncio.Event()
            await server.run()

        asyncio.run(serve())

    def _app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/health", _health, methods=["GET"]),
                *self._routes.routes("/v1"),
                *self._routes.routes(f"/rollouts/{{{ROLLOUT}:path}}/in/{{{FUNCTIONS}}}/v1"),
                *self._routes.routes(f"/rollouts/{{{ROLLOUT}:path}}/v1"),
            ],
            exception_handlers={HTTPException: _unknown_route},
        )

    def _is_closing(self) -> asyncio.Event:
        assert self._closing is not None
        return self._closing


class _OnePolicy:
    """The ``ChatModels`` of one policy under fixed names."""

    def __init__(self, source: PolicySource, names: list[str], is_alias: Callable[[str], bool], api_key: str) -> None:
        self._source = source
        self._names = names
        self._is_alias = is_alias
        self._api_key = api_key

    def authorize(self, headers: Mapping[str, str]) -> str:
        refuse_web_pages(headers)
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), self._api_key.encode()):
            raise ApiError(
                401,
                "missing or wrong API key; use the key that the policy endpoint was started with",
                code="invalid_api_key",
            )
        return "local"

    async def names(self, caller: str) -> list[str]:
        return self._names

    async def source(self, name: str, caller: str) -> PolicySource:
        if not self._is_alias(name):
            check_model(name, self._names)
        return self._source


async def _health(request: Request) -> Response:
    return JSONResponse({"status": "ok"})


async def _unknown_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return error_response(
        ApiError(
            error.status_code,
            f"{request.method} {request.url.path} is not served here; there are POST /v1/chat/completions, "
            "/v1/completions, /v1/responses, /tokenize and /inference/v1/generate, GET /v1/models and GET /health",
            code="unknown_url",
        )
    )
