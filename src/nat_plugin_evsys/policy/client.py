"""Clients of the policy endpoint whose requests say which NAT run and step they belong to."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from nat_plugin_evsys.policy.attribution import attribution_headers

if TYPE_CHECKING:
    import openai
    from langchain_openai import ChatOpenAI

    from nat_plugin_evsys.policy.endpoint import PolicyEndpoint

_CONNECT_SECONDS = 10.0
MAX_RETRIES = 2


def attribution_client(timeout: float) -> openai.DefaultAsyncHttpxClient:
    """An async HTTP client for OpenAI clients (``http_client=``) that adds the attribution headers.

    It uses the same HTTP library as the installed ``openai``. It ignores proxies of the environment, since the endpoint
    listens on this machine.

    Args:
        timeout: seconds for one call.
    """
    import openai

    async def attribute(request: Any) -> None:
        request.headers.update(attribution_headers())

    return openai.DefaultAsyncHttpxClient(event_hooks={"request": [attribute]}, **_client_settings(timeout))


def sync_attribution_client(timeout: float) -> openai.DefaultHttpxClient:
    """Like ``attribution_client``, for synchronous calls."""
    import openai

    def attribute(request: Any) -> None:
        request.headers.update(attribution_headers())

    return openai.DefaultHttpxClient(event_hooks={"request": [attribute]}, **_client_settings(timeout))


def langchain_chat_model(
    *,
    base_url: str,
    api_key: str,
    model: str,
    timeout: float,
    disable_streaming: bool = False,
    use_responses_api: bool = False,
    http_client: openai.DefaultHttpxClient | None = None,
    http_async_client: openai.DefaultAsyncHttpxClient | None = None,
    **options: Any,
) -> ChatOpenAI:
    """An ordinary ``ChatOpenAI`` bound to the policy endpoint. It sends no sampling settings.

    Args:
        disable_streaming: make plain calls even if a stream is requested (same tokens, less CPU).
        use_responses_api: call ``/responses`` instead of ``/chat/completions``.
        http_client: default is ``sync_attribution_client(timeout)``.
        http_async_client: default is ``attribution_client(timeout)``.
        options: further settings of ChatOpenAI, e.g. ``temperature``.
    """
    from langchain_openai import ChatOpenAI
    from pydantic import SecretStr

    return ChatOpenAI(
        base_url=base_url,
        api_key=SecretStr(api_key),
        model=model,
        timeout=timeout,
        disable_streaming=disable_streaming,
        stream_usage=True,  # NAT counts tokens; it asks for the usage chunk of streams only
        use_responses_api=use_responses_api,
        max_retries=MAX_RETRIES,
        http_client=http_client or sync_attribution_client(timeout),
        http_async_client=http_async_client or attribution_client(timeout),
        **options,
    )


@asynccontextmanager
async def open_langchain_client(
    endpoint: PolicyEndpoint,
    *,
    model: str,
    timeout: float,  # noqa: ASYNC109 - a setting of the client, not of this function
    disable_streaming: bool,
    use_responses_api: bool = False,
) -> AsyncIterator[ChatOpenAI]:
    """A ``ChatOpenAI`` bound to a running endpoint; its connections are closed at the end."""
    asynchronous, synchronous = attribution_client(timeout), sync_attribution_client(timeout)
    try:
        yield langchain_chat_model(
            base_url=endpoint.base_url,
            api_key=endpoint.api_key,
            model=model,
            timeout=timeout,
            disable_streaming=disable_streaming,
            use_responses_api=use_responses_api,
            http_client=synchronous,
            http_async_client=asynchronous,
        )
    finally:
        await asynchronous.aclose()
        synchronous.close()


def _client_settings(timeout: float) -> dict[str, Any]:
    import openai

    return {
        "timeout": openai.Timeout(timeout, connect=min(timeout, _CONNECT_SECONDS)),
        "trust_env": False,
        "verify": _no_authorities(),
    }


@cache
def _no_authorities() -> ssl.SSLContext:
    """Trusts nobody: the endpoint speaks plain HTTP, and reading the usual authorities takes longer than a call."""
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
