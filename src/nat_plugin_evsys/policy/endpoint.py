"""The policy endpoint: an OpenAI-compatible server in this process, on its own thread and event loop."""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ..errors import ConfigError, EvsysError
from ..types import RUN_ID_HEADER, RunKind
from .api_errors import ApiError
from .chat import ChatRenderer
from .completions import Completion, PolicySource, SamplingDefaults, check_model
from .event_stream import ClientGone, EventStream, Peer, completion_events
from .protocol import ChatCompletion, ChatCompletionRequest, to_json
from .recorder import Recorder

if TYPE_CHECKING:
    import uvicorn

    from ..backends.base import SamplingClient

__all__ = ["PolicyEndpoint", "SamplingDefaults"]

logger = logging.getLogger(__name__)

_START_SECONDS = 30.0
_CLOSE_SECONDS = 10.0
# Longer than clients keep idle connections (httpx: 5 s), so that none is closed just as a request goes out on it.
_KEEP_ALIVE_SECONDS = 75


class PolicyEndpoint:
    """``POST /v1/chat/completions``, ``GET /v1/models`` and ``GET /health`` for the policy.

    Args:
        renderer: gives the chat renderer; called for each request, may be async and may load the model.
        sampling_client: gives the client of the policy version to sample from; called for each request, so a new
            version takes effect at the next one while calls in flight finish on theirs.
        recorder: keeps the calls.
        defaults: what is sampled with where a request does not say, by the kind of its run.
        model_names: the names that requests may ask for.
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
        host: str = "127.0.0.1",
        port: int = 0,
        api_key: str | None = None,
    ) -> None:
        self.api_key = api_key or f"sk-evsys-{secrets.token_urlsafe(24)}"
        self._source = PolicySource(renderer, sampling_client, recorder, defaults)
        self._model_names = list(model_names)
        self._host, self._port = host, port
        self._created = int(time.time())
        self._url: str | None = None
        self._server: uvicorn.Server | None = None
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
        if self._url is None:
            raise EvsysError("the policy endpoint is not running; call start() first")
        return self._url

    def start(self) -> None:
        """Listen; returns when requests are answered. Does nothing when it runs already.

        Raises:
            ConfigError: the address cannot be listened on.
            EvsysError: the server did not come up.
        """
        if self._thread is not None:
            return
        listener = self._listen()
        self._thread = threading.Thread(target=self._serve, args=(listener,), name="evsys-endpoint", daemon=True)
        self._thread.start()
        deadline = time.monotonic() + _START_SECONDS
        while self._server is None or not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                listener.close()
                raise EvsysError(f"the policy endpoint did not start on {self._host}:{self._port}; see the log")
            time.sleep(0.002)
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self._host, self._host)
        self._url = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}/v1"

    def close(self) -> None:
        """Stop listening. Requests in flight are answered 503 and their sampling is cancelled."""
        thread, self._thread, self._url = self._thread, None, None
        if thread is None or self._server is None or self._loop is None or self._closing is None:
            return
        self._server.should_exit = True
        with suppress(RuntimeError):  # its loop may have ended already
            self._loop.call_soon_threadsafe(self._closing.set)
        if thread is not threading.current_thread():
            thread.join(_CLOSE_SECONDS)
        self._server = None

    def _listen(self) -> socket.socket:
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((self._host, self._port))
            listener.listen(2048)
        except OSError as error:
            listener.close()
            raise ConfigError(
                f"the policy endpoint cannot listen on {self._host}:{self._port} ({error.strerror}); "
                "set another `port` of the evsys_policy LLM, or 0 for a free one"
            ) from error
        return listener

    def _serve(self, listener: socket.socket) -> None:
        import uvicorn

        async def serve() -> None:
            self._loop, self._closing = asyncio.get_running_loop(), asyncio.Event()
            self._server = uvicorn.Server(
                uvicorn.Config(
                    self._app(),
                    log_config=None,
                    log_level="warning",
                    access_log=False,
                    lifespan="off",
                    ws="none",
                    timeout_keep_alive=_KEEP_ALIVE_SECONDS,
                    timeout_graceful_shutdown=5,
                )
            )
            await self._server.serve(sockets=[listener])

        asyncio.run(serve())

    def _app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/health", self._health, methods=["GET"]),
                Route("/v1/models", self._guarded(self._models), methods=["GET"]),
                Route("/v1/models/{name:path}", self._guarded(self._model), methods=["GET"]),
                Route("/v1/chat/completions", self._guarded(self._completions), methods=["POST"]),
            ],
            exception_handlers={HTTPException: _unknown_route},
        )

    # -- routes -----------------------------------------------------------------------------------------------------

    def _guarded(self, handler: Callable[[Request], Coroutine[Any, Any, Response]]) -> Callable[[Request], Any]:
        """Check the key, and turn every exception into OpenAI's error object."""

        async def guarded(request: Request) -> Response:
            try:
                self._authorize(request)
                return await handler(request)
            except ClientGone:
                self._source.recorder.disconnect()
                return Response(status_code=499)  # nobody reads it
            except Exception as error:  # noqa: BLE001 - the boundary: answered, counted and logged
                return error_response(self._fail(error, request.headers.get(RUN_ID_HEADER)))

        return guarded

    def _fail(self, error: Exception, run_id: str | None) -> ApiError:
        answer = ApiError.of(error)
        if answer.is_infrastructure:
            self._source.recorder.fail(run_id, answer.code or "internal_error", answer.message)
            unexpected = not isinstance(error, ApiError | EvsysError)
            logger.error("policy endpoint: %s", answer.message, exc_info=error if unexpected else None)
        return answer

    def _authorize(self, request: Request) -> None:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), self.api_key.encode()):
            raise ApiError(
                401,
                "missing or wrong API key; use the key that the policy endpoint was started with",
                code="invalid_api_key",
            )

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model_object(name) for name in self._model_names]})

    async def _model(self, request: Request) -> Response:
        name = request.path_params["name"]
        check_model(name, self._model_names)
        return JSONResponse(self._model_object(name))

    def _model_object(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._created, "owned_by": "nat_plugin_evsys"}

    async def _completions(self, request: Request) -> Response:
        parsed = ChatCompletionRequest.parse(await request.body())
        check_model(parsed.model, self._model_names)
        assert self._closing is not None
        peer = Peer(request.receive, self._closing)
        try:
            completion = await peer.guard(Completion.prepare(parsed, request.headers, self._source))
            if parsed.stream:
                events = completion_events(completion, peer, self._source.recorder, self._fail)
                # Up to the first event an error still has a status of its own.
                return EventStream(await anext(events), events, peer)
            sequences = await peer.guard(completion.sample())
        except BaseException:
            peer.close()
            raise
        peer.close()
        recorder = self._source.recorder
        answer = ChatCompletion(
            id=completion.id,
            created=completion.created,
            model=parsed.model,
            system_fingerprint=completion.fingerprint,
            choices=[completion.record(index, sequence, recorder) for index, sequence in enumerate(sequences)],
            usage=completion.usage(sequences),
            prompt_token_ids=completion.prompt_ids if parsed.return_token_ids else None,
        )
        return Response(to_json(answer), media_type="application/json")


def error_response(error: ApiError) -> JSONResponse:
    """An error in OpenAI's shape."""
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers())


async def _unknown_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return error_response(
        ApiError(
            error.status_code,
            f"{request.method} {request.url.path} is not served here; there are POST /v1/chat/completions, "
            "GET /v1/models and GET /health",
            code="unknown_url",
        )
    )
