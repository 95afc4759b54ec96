"""NAT functions that call the policy by ordinary clients, none of which NAT made; found by the ``agents`` fixture."""

from __future__ import annotations

import asyncio
import json
import threading
import urllib.request
from collections.abc import AsyncIterator, Callable
from typing import Any

from nat.plugin_api import Builder, FunctionBaseConfig, FunctionInfo, register_function

from nat_plugin_evsys import policy_endpoint


class RawAgentConfig(FunctionBaseConfig, name="raw_agent"):
    """Asks the policy by the client that its row names (``client: question``)."""

    llm_name: str = "policy"
    client: str | None = None


@register_function(config_type=RawAgentConfig)
async def raw_agent(config: RawAgentConfig, _builder: Builder) -> AsyncIterator[FunctionInfo]:
    """Yield the workflow as NAT knows it."""
    import openai

    kept = policy_endpoint(config.llm_name)  # before any rollout: carries none
    client = openai.AsyncOpenAI(base_url=kept.base_url, api_key=kept.api_key)

    async def _ask(question: str) -> str:
        name = config.client or question.split(":")[0]
        messages = [{"role": "user", "content": question}]
        if name == "openai":
            reply = await client.chat.completions.create(model=config.llm_name, messages=messages)  # type: ignore[arg-type]
            return reply.choices[0].message.content or ""
        if name == "broken":
            await client.chat.completions.create(model=config.llm_name, messages=messages)  # type: ignore[arg-type]
            raise ConnectionError("the ticket system is down")
        loop = asyncio.get_running_loop()
        if name == "thread":
            return await loop.run_in_executor(None, in_thread, by_urllib, kept.base_url, kept.api_key, messages)
        url = policy_endpoint().base_url if name == "urllib" else kept.base_url
        return await loop.run_in_executor(None, CLIENTS[name], url, kept.api_key, messages)

    yield FunctionInfo.from_fn(_ask, description="Answers a question.")
    await client.close()


def by_requests(base_url: str, api_key: str, messages: list[dict[str, Any]]) -> str:
    import requests

    answer = requests.post(
        f"{base_url}/chat/completions",
        json={"model": "builtin/tiny", "messages": messages},
        headers={"authorization": f"Bearer {api_key}"},
        timeout=60,
    )
    answer.raise_for_status()
    return str(answer.json()["choices"][0]["message"]["content"])


def by_langchain(base_url: str, api_key: str, messages: list[dict[str, Any]]) -> str:
    from langchain_openai import ChatOpenAI
    from pydantic import SecretStr

    model = ChatOpenAI(base_url=base_url, api_key=SecretStr(api_key), model="builtin/tiny")
    return str(model.invoke(messages).content)


def by_urllib(base_url: str, api_key: str, messages: list[dict[str, Any]]) -> str:
    """A client that nothing in the process knows of."""
    body = json.dumps({"model": "builtin/tiny", "messages": messages}).encode()
    headers = {"authorization": f"Bearer {api_key}", "content-type": "application/json"}
    request = urllib.request.Request(f"{base_url}/chat/completions", body, headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return str(json.load(answer)["choices"][0]["message"]["content"])


def in_thread(ask: Callable[..., str], *args: Any) -> str:
    """Call in a thread that inherits no context."""
    said: list[str] = []
    thread = threading.Thread(target=lambda: said.append(ask(*args)))
    thread.start()
    thread.join()
    return said[0]


CLIENTS = {"requests": by_requests, "langchain": by_langchain, "urllib": by_urllib}
