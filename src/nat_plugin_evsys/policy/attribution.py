"""Which rollout a call belongs to: the one in whose context it is made, whatever HTTP client makes it.

NAT keeps the run and the step of the moment in context variables. Here they become two headers of every request that
this process sends to a policy endpoint.
"""

from __future__ import annotations

import contextvars
import functools
import importlib
import importlib.util
import threading
from collections.abc import Callable, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from nat_plugin_evsys.calls import FUNCTIONS_HEADER, RUN_ID_HEADER, STEP_ID_HEADER

_ROOT_SPAN = "root"
_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})

Address = tuple[str, int]
Headers = MutableMapping[str, str]


def attribution_headers() -> dict[str, str]:
    """The headers of a call made now: NAT's workflow run id, the UUID of the step and the functions that make it.

    Inside a LangChain model's call the innermost active span is the LLM_START step; in a function that calls the
    endpoint with a client of its own it is the function's step.
    """
    from nat.builder.context import ContextState

    state = ContextState.get()
    run_id, step_id = state.workflow_run_id.get(), state.active_span_id_stack.get()[-1]
    headers = {} if run_id is None else {RUN_ID_HEADER: run_id}
    if step_id != _ROOT_SPAN:
        headers[STEP_ID_HEADER] = step_id
    if functions := state.function_path_stack.get():
        headers[FUNCTIONS_HEADER] = ",".join(quote(name, safe="") for name in functions)
    return headers


def functions_of(header: str | None) -> list[str]:
    """The names of the functions in a header, the outermost first."""
    return [unquote(name) for name in header.split(",")] if header else []


class CallAttribution:
    """Adds the attribution headers to what this process sends to the addresses that it knows.

    It sees ``httpx`` (and so OpenAI's client and all that are built on it), ``requests`` and ``aiohttp``; other
    clients, and other processes, take the URL of ``policy_endpoint()``. What a rollout gives to a thread pool runs in
    the rollout's context, as ``asyncio.to_thread`` does it, so calls in ``run_in_executor`` belong to it too. A thread
    of one's own does not inherit it: it may outlive the rollout and work for others.

    The libraries' classes are changed while there is an address, and restored after. Any thread may call any method.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._addresses: frozenset[Address] = frozenset()
        self._originals: list[tuple[type, str, Any]] = []

    def add(self, address: Address) -> None:
        """Attribute the calls to ``(host, port)`` from now on."""
        with self._lock:
            self._addresses |= {address}
            if not self._originals:
                self._install()

    def remove(self, address: Address) -> None:
        """Leave the calls to ``(host, port)`` alone again; does nothing where they are."""
        with self._lock:
            self._addresses -= {address}
            if self._addresses:
                return
            for owner, name, original in reversed(self._originals):
                setattr(owner, name, original)
            self._originals.clear()

    def attribute(self, host: str, port: int | None, headers: Headers) -> None:
        """Add the headers of a call made now, where it goes to a policy endpoint and names no rollout of its own."""
        if RUN_ID_HEADER not in headers and any(_is_same(host, port, address) for address in self._addresses):
            headers.update(attribution_headers())

    def _install(self) -> None:
        self._wrap(ThreadPoolExecutor, "submit", _submit)
        for name in ("httpx", "httpx2"):
            if (httpx := _installed(name)) is not None:
                self._wrap(httpx.Client, "send", self._httpx_send)
                self._wrap(httpx.AsyncClient, "send", self._httpx_async_send)
        if (requests := _installed("requests")) is not None:
            self._wrap(requests.Session, "send", self._requests_send)
        if (aiohttp := _installed("aiohttp")) is not None:
            self._wrap(aiohttp.ClientSession, "__init__", functools.partial(self._aiohttp_session, aiohttp))

    def _wrap(self, owner: type, name: str, wrap: Callable[[Any], Any]) -> None:
        original = getattr(owner, name)
        setattr(owner, name, functools.wraps(original)(wrap(original)))
        self._originals.append((owner, name, original))

    def _httpx_send(self, original: Any) -> Any:
        def send(client: Any, request: Any, **options: Any) -> Any:
            self.attribute(request.url.host, request.url.port, request.headers)
            return original(client, request, **options)

        return send

    def _httpx_async_send(self, original: Any) -> Any:
        async def send(client: Any, request: Any, **options: Any) -> Any:
            self.attribute(request.url.host, request.url.port, request.headers)
            return await original(client, request, **options)

        return send

    def _requests_send(self, original: Any) -> Any:
        def send(session: Any, request: Any, **options: Any) -> Any:
            url = urlsplit(request.url)
            self.attribute(url.hostname or "", url.port, request.headers)
            return original(session, request, **options)

        return send

    def _aiohttp_session(self, aiohttp: Any, original: Any) -> Any:
        async def on_request_start(session: Any, context: Any, params: Any) -> None:
            self.attribute(params.url.host or "", params.url.port, params.headers)

        def init(session: Any, *args: Any, trace_configs: Any = None, **options: Any) -> None:
            tracing = aiohttp.TraceConfig()
            tracing.on_request_start.append(on_request_start)
            original(session, *args, trace_configs=[*(trace_configs or ()), tracing], **options)

        return init


CALL_ATTRIBUTION = CallAttribution()
"""The one of this process: the classes that it changes are the process's too."""


def _submit(original: Any) -> Any:
    """``ThreadPoolExecutor.submit`` that takes the context of a rollout along."""
    from nat.builder.context import ContextState

    def submit(pool: Any, task: Any, /, *args: Any, **options: Any) -> Any:
        if ContextState.get().workflow_run_id.get() is not None:
            task = functools.partial(contextvars.copy_context().run, task)
        return original(pool, task, *args, **options)

    return submit


def _is_same(host: str, port: int | None, address: Address) -> bool:
    return port == address[1] and (host == address[0] or host in _LOOPBACK)


def _installed(name: str) -> Any:
    """The library, or None. What a workflow imports later is the same class, so it is imported now."""
    return importlib.import_module(name) if importlib.util.find_spec(name) is not None else None
