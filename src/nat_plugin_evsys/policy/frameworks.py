"""The policy as the client of each agent framework but LangChain: that framework's own class, bound to the endpoint.

A client sends no sampling settings of its own, so those of the policy hold; it retries as often as LangChain's.
A framework is imported when a workflow asks for its client.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nat.builder.framework_enum import LLMFrameworkEnum

from nat_plugin_evsys.errors import ConfigError
from nat_plugin_evsys.policy.attribution import attribution_headers
from nat_plugin_evsys.policy.client import MAX_RETRIES, attribution_client, sync_attribution_client

if TYPE_CHECKING:
    import openai

    from nat_plugin_evsys.policy.endpoint import PolicyEndpoint


@dataclass(frozen=True, slots=True)
class Connection:
    """What the clients are made of: OpenAI's own two clients, and their parts for a class that makes its own.

    Attributes:
        model: the name to ask for.
        timeout: seconds for one call.
    """

    base_url: str
    api_key: str
    model: str
    timeout: float
    client: openai.OpenAI
    async_client: openai.AsyncOpenAI
    http_client: openai.DefaultAsyncHttpxClient


def _llama_index(to: Connection) -> Any:
    from llama_index.llms.openai_like import OpenAILike

    llm = OpenAILike(  # its `OpenAI` knows OpenAI's models only
        model=to.model,
        api_base=to.base_url,
        api_key=to.api_key,
        max_retries=MAX_RETRIES,
        timeout=to.timeout,
        is_chat_model=True,
        is_function_calling_model=True,
        openai_client=to.client,
        async_openai_client=to.async_client,
    )
    llm.temperature = None  # it would send 0.1; null is the policy's own
    return llm


def _crewai(to: Connection) -> Any:
    import httpx
    from crewai import LLM
    from crewai.llms.hooks.base import BaseInterceptor

    class Unconstrained(BaseInterceptor[httpx.Request, httpx.Response]):  # type: ignore[misc]  # untyped here
        """Without ``strict``, which CrewAI asks of every tool, whatever is set, so that it is nobody's wish.

        The policy would hold each call to it (``hints: honour``), or refuse the request (``hints: refuse``).
        """

        def on_outbound(self, message: httpx.Request) -> httpx.Request:
            body = json.loads(message.read())
            for tool in body.get("tools") or ():
                tool["function"].pop("strict", None)
            headers = {name: value for name, value in message.headers.items() if name != "content-length"}
            headers |= attribution_headers()
            return httpx.Request(message.method, message.url, headers=headers, json=body, extensions=message.extensions)

        def on_inbound(self, message: httpx.Response) -> httpx.Response:
            return message

        async def aon_outbound(self, message: httpx.Request) -> httpx.Request:
            return self.on_outbound(message)

        async def aon_inbound(self, message: httpx.Response) -> httpx.Response:
            return message

    return LLM(
        model=to.model,
        provider="openai",  # or it asks LiteLLM for every name that is none of OpenAI's
        base_url=to.base_url,
        api_key=to.api_key,
        max_retries=MAX_RETRIES,
        timeout=to.timeout,
        interceptor=Unconstrained(),
    )


def _agno(to: Connection) -> Any:
    from agno.models.openai.like import OpenAILike

    return OpenAILike(id=to.model, client=to.client, async_client=to.async_client)


def _adk(to: Connection) -> Any:
    from google.adk.models.lite_llm import LiteLlm

    return LiteLlm(
        f"openai/{to.model}",
        api_base=to.base_url,
        api_key=to.api_key,
        timeout=to.timeout,
        client=to.async_client,
    )


def _semantic_kernel(to: Connection) -> Any:
    from semantic_kernel.connectors.ai.open_ai import OpenAIChatCompletion

    return OpenAIChatCompletion(ai_model_id=to.model, async_client=to.async_client)


def _strands(to: Connection) -> Any:
    from strands.models.openai import OpenAIModel

    return OpenAIModel(client=to.async_client, model_id=to.model)


def _autogen(to: Connection) -> Any:
    from autogen_core.models import ModelFamily, ModelInfo
    from autogen_ext.models.openai import OpenAIChatCompletionClient

    return OpenAIChatCompletionClient(
        model=to.model,
        base_url=to.base_url,
        api_key=to.api_key,
        max_retries=MAX_RETRIES,
        timeout=to.timeout,
        http_client=to.http_client,
        model_info=ModelInfo(
            vision=False,
            function_calling=True,
            json_output=False,  # nothing promises it over a service, nor without `hints: honour`
            structured_output=False,
            family=ModelFamily.UNKNOWN,
            multiple_system_messages=True,
        ),
    )


CLIENTS: dict[LLMFrameworkEnum, Callable[[Connection], Any]] = {
    LLMFrameworkEnum.LLAMA_INDEX: _llama_index,
    LLMFrameworkEnum.CREWAI: _crewai,
    LLMFrameworkEnum.AGNO: _agno,
    LLMFrameworkEnum.ADK: _adk,
    LLMFrameworkEnum.SEMANTIC_KERNEL: _semantic_kernel,
    LLMFrameworkEnum.STRANDS: _strands,
    LLMFrameworkEnum.AUTOGEN: _autogen,
}


@asynccontextmanager
async def open_framework_client(
    framework: LLMFrameworkEnum,
    endpoint: PolicyEndpoint,
    *,
    model: str,
    timeout: float,  # noqa: ASYNC109 - a setting of the client, not of this function
) -> AsyncIterator[Any]:
    """The framework's client of a running endpoint; its connections are closed at the end.

    Raises:
        ConfigError: the framework is not installed.
    """
    import openai

    settings: dict[str, Any] = {
        "base_url": endpoint.base_url,
        "api_key": endpoint.api_key,
        "max_retries": MAX_RETRIES,
        "timeout": timeout,
    }
    http = attribution_client(timeout)
    with openai.OpenAI(**settings, http_client=sync_attribution_client(timeout)) as client:
        async with openai.AsyncOpenAI(**settings, http_client=http) as async_client:
            connection = Connection(endpoint.base_url, endpoint.api_key, model, timeout, client, async_client, http)
            try:
                made = CLIENTS[framework](connection)
            except ImportError as error:
                package = f"nvidia-nat-{framework.value.replace('_', '-')}"
                raise ConfigError(f"the policy's {framework.value} client: {error}; pip install {package}") from error
            yield made
