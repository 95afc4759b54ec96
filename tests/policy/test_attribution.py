"""Calls of ordinary HTTP clients belong to the rollout in whose context they are made."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import json
import threading
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
import requests
from nat.builder.context import ContextState

from nat_plugin_evsys.calls import FUNCTIONS_HEADER
from nat_plugin_evsys.errors import EvsysError
from nat_plugin_evsys.policy.attribution import CALL_ATTRIBUTION, attribution_headers

MODEL = "builtin/tiny"
BODY = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}


@contextlib.contextmanager
def rollout(run_id: str) -> Iterator[None]:
    """The context of a rollout, as the trainer's sessions set it."""
    token = ContextState.get().workflow_run_id.set(run_id)
    try:
        yield
    finally:
        ContextState.get().workflow_run_id.reset(token)


@pytest.fixture
def served(serve: Callable[..., Any]) -> Any:
    """An endpoint whose calls are attributed, with the rollouts `one` and `two` open."""
    served = serve(lambda prompt: "yes")
    served.endpoint.attribute_calls()
    for run_id in ("one", "two"):
        served.recorder.open_run(run_id, "rollout", 1)
    return served


def by_openai(served: Any, base_url: str) -> None:
    with openai.OpenAI(base_url=base_url, api_key=served.endpoint.api_key, max_retries=0) as client:
        client.chat.completions.create(**BODY)


def by_httpx(served: Any, base_url: str) -> None:
    with httpx.Client(headers=served.auth()) as client:
        client.post(f"{base_url}/chat/completions", json=BODY).raise_for_status()


def by_requests(served: Any, base_url: str) -> None:
    requests.post(f"{base_url}/chat/completions", json=BODY, headers=served.auth(), timeout=20).raise_for_status()


def by_urllib(served: Any, base_url: str) -> None:
    headers = {**served.auth(), "content-type": "application/json"}
    request = urllib.request.Request(f"{base_url}/chat/completions", json.dumps(BODY).encode(), headers)
    with urllib.request.urlopen(request, timeout=20) as answer:
        assert answer.status == 200


async def by_async_openai(served: Any, base_url: str) -> None:
    async with openai.AsyncOpenAI(base_url=base_url, api_key=served.endpoint.api_key, max_retries=0) as client:
        stream = await client.chat.completions.create(**BODY, stream=True)
        async for _ in stream:
            pass


async def by_async_httpx(served: Any, base_url: str) -> None:
    async with httpx.AsyncClient(headers=served.auth()) as client:
        (await client.post(f"{base_url}/chat/completions", json=BODY)).raise_for_status()


async def by_aiohttp(served: Any, base_url: str) -> None:
    aiohttp = pytest.importorskip("aiohttp")
    async with (
        aiohttp.ClientSession(headers=served.auth()) as session,
        session.post(f"{base_url}/chat/completions", json=BODY) as answer,
    ):
        answer.raise_for_status()
        await answer.read()


def calls(served: Any) -> dict[str, int]:
    counted = {run_id: len(served.recorder.close_run(run_id)) for run_id in ("one", "two")}
    return {**counted, "unattributed": served.recorder.totals.unattributed}


@pytest.mark.parametrize("call", [by_openai, by_httpx, by_requests])
def test_a_client_of_ones_own(served: Any, call: Callable[[Any, str], None]) -> None:
    for run_id in ("one", "two", "two"):
        with rollout(run_id):
            call(served, served.endpoint.base_url)
    call(served, served.endpoint.base_url)
    assert calls(served) == {"one": 1, "two": 2, "unattributed": 1}


@pytest.mark.parametrize("call", [by_async_openai, by_async_httpx, by_aiohttp])
async def test_an_async_client_of_ones_own(served: Any, call: Callable[[Any, str], Any]) -> None:
    async def roll_out(run_id: str) -> None:
        with rollout(run_id):
            await call(served, served.endpoint.base_url)

    await asyncio.gather(roll_out("one"), roll_out("two"), roll_out("two"))
    await call(served, served.endpoint.base_url)
    assert calls(served) == {"one": 1, "two": 2, "unattributed": 1}


async def test_a_call_in_an_executor_belongs_to_the_rollout_that_asked_for_it(served: Any) -> None:
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(1) as pool:  # one thread works for both rollouts, and for nobody

        async def roll_out(run_id: str) -> None:
            with rollout(run_id):
                await loop.run_in_executor(pool, by_openai, served, served.endpoint.base_url)

        await asyncio.gather(roll_out("one"), roll_out("two"), roll_out("one"))
        await loop.run_in_executor(pool, by_openai, served, served.endpoint.base_url)
    assert calls(served) == {"one": 2, "two": 1, "unattributed": 1}


@pytest.mark.parametrize("call", [by_openai, by_urllib])
def test_a_url_carries_its_rollout_from_any_thread_and_client(served: Any, call: Callable[[Any, str], None]) -> None:
    served.recorder.open_run("epoch-0000/000003", "rollout", 1)
    thread = threading.Thread(target=call, args=(served, served.endpoint.url_of("epoch-0000/000003")))
    thread.start()
    thread.join()
    assert len(served.recorder.close_run("epoch-0000/000003")) == 1


@pytest.mark.parametrize("by_url", [False, True])
def test_a_call_says_in_which_functions_it_was_made(served: Any, by_url: bool) -> None:
    def call_in(functions: list[str]) -> None:
        with rollout("one"):
            ContextState.get().function_path_stack.set(functions)
            headers = attribution_headers()
            url = served.endpoint.url_of("one", headers[FUNCTIONS_HEADER]) if by_url else served.endpoint.base_url
            if by_url:
                ContextState.get().function_path_stack.set([])
            by_openai(served, url)

    functions = ["<workflow>", "a/b, c", "group__ü"]
    contextvars.copy_context().run(call_in, functions)
    assert [call.functions for call in served.recorder.close_run("one")] == [functions]


def test_the_context_wins_over_a_url_that_was_kept_from_another_rollout(served: Any) -> None:
    with rollout("two"):
        by_openai(served, served.endpoint.url_of("one"))
    assert calls(served) == {"one": 0, "two": 1, "unattributed": 0}


def test_other_addresses_are_left_alone_and_the_classes_are_restored(serve: Callable[..., Any]) -> None:
    watched, other = serve(lambda prompt: "yes"), serve(lambda prompt: "yes")
    before = httpx.Client.send, requests.Session.send, ThreadPoolExecutor.submit
    watched.endpoint.attribute_calls()
    other.recorder.open_run("one", "rollout", 1)
    with rollout("one"):
        by_httpx(other, other.endpoint.base_url)
    assert other.recorder.close_run("one") == []
    assert httpx.Client.send is not before[0]
    watched.endpoint.close()
    assert (httpx.Client.send, requests.Session.send, ThreadPoolExecutor.submit) == before


def test_a_rollouts_url_needs_a_running_endpoint(serve: Callable[..., Any]) -> None:
    served = serve([])
    served.endpoint.close()
    with pytest.raises(EvsysError, match="not running"):
        served.endpoint.url_of("one")
    assert not CALL_ATTRIBUTION._originals
