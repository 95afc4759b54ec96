"""What is refused, how, and what happens when a call goes wrong."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import subprocess
import sys
import threading
import time
from typing import Any

import httpx
import openai
import pytest

from nat_plugin_evsys.calls import RUN_ID_HEADER
from nat_plugin_evsys.config import EvsysPolicyConfig
from nat_plugin_evsys.errors import ConfigError, EngineClosedError, EvsysError, ModelError
from nat_plugin_evsys.policy import endpoint as policy_endpoint
from nat_plugin_evsys.policy.chat import ChatRenderer
from nat_plugin_evsys.policy.endpoint import PolicyEndpoint
from nat_plugin_evsys.policy.policy import Policy
from nat_plugin_evsys.web import bounded_protocol
from nat_plugin_evsys.web.listen import HttpServer

MODEL = "builtin/tiny"
MESSAGES: list[Any] = [{"role": "user", "content": "hello"}]
IMAGE = [{"type": "image_url", "image_url": {"url": "https://x/y.png"}}]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def _tool(parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "add", "parameters": parameters}}


async def post(served: Any, body: dict[str, Any] | bytes, **options: Any) -> httpx.Response:
    content = {"content": body} if isinstance(body, bytes) else {"json": body}
    async with httpx.AsyncClient(headers=served.auth()) as client:
        return await client.post(f"{served.endpoint.base_url}/chat/completions", **content, **options)


async def until(condition: Any, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"temprature": 0.1}, "temprature", "`temprature` is not honoured"),
        ({"min_p": 1.1}, "min_p", "less than or equal to 1"),
        ({"functions": [{}]}, "functions", "send `tools`"),
        ({"best_of": 2}, "best_of", "only 1"),
        ({"messages": [{"role": "assistant", "function_call": {}}]}, "messages", "`tool_calls`"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages[0].role", "'tool'"),
        (
            {"messages": [{"role": "user", "content": IMAGE}]},
            None,
            "`messages[0].content[0]` is an image, and this policy reads text only",
        ),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "hello"}, "messages", "valid array"),
        ({"tools": [TOOL], "tool_choice": "always"}, None, "must be auto, none, required"),
        ({"tool_choice": "required"}, None, "has no `tools`"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "sub"}}}, None, "`tools` has add"),
        ({"tools": [{"type": "web_search"}]}, "tools", "type: function"),
        ({"tools": [_tool([1])]}, "tools", "the `parameters` of `add` must be a JSON schema"),
        ({"tools": [_tool({"properties": [1]})]}, "tools", "`parameters.properties` of `add` must be an object"),
        ({"tools": [_tool({"required": [[]]})]}, "tools", "`parameters.required` of `add` must be a list of names"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]", "greater than or equal to 0"),
        ({"stop_token_ids": [2**32]}, "stop_token_ids[0]", "less than"),
        ({"stop_token_ids": [40], "stop": "x"}, "stop_token_ids", "beside `stop` must be ids of control tokens"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "'text'"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, None, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "goes with"),
        ({"presence_penalty": 2.5}, "presence_penalty", "less than or equal to 2"),
        ({"frequency_penalty": -3}, "frequency_penalty", "greater than or equal to -2"),
        ({"repetition_penalty": 0}, "repetition_penalty", "greater than 0"),
        ({"logit_bias": {"3": 101}}, "logit_bias", "from -100 to 100"),
        ({"logit_bias": {"the": 5}}, "logit_bias", "a token id"),
        ({"min_tokens": 3, "stop": "x"}, None, "no `stop`"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"temperature": "hot"}, "temperature", "valid number"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"top_k": -2}, "top_k", "-1"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 1000}, "n", "128"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, None, "differ"),
        ({"stop": ["a", ""]}, "stop", "none of them empty"),
        ({"stop": [3]}, None, "`stop"),
        ({"logprobs": 2}, "logprobs", "valid boolean"),
        ({"top_logprobs": 2}, None, "`logprobs: true`"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
        ({"stream_options": {"include_usage": True}}, None, "`stream: true`"),
        ({"chat_template_kwargs": {"colour": 1}}, "chat_template_kwargs.colour", "not honoured"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, None, "does not use it"),
    ],
)
async def test_fields_are_refused_by_name(serve: Any, fields: dict[str, Any], param: str | None, words: str) -> None:
    served = serve([])
    for stream in ({}, {"stream": True}):
        if "stream_options" in fields and stream:
            continue
        response = await post(served, {"model": MODEL, "messages": MESSAGES, **fields, **stream})
        error = response.json()["error"]
        assert response.status_code == 400, error
        assert words in error["message"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
        if param is not None:
            assert error["param"] == param
    assert served.sampling.requests == []


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "u", "metadata": {"a": "b"}, "store": False, "safety_identifier": "s", "prompt_cache_key": "k"},
        {"presence_penalty": 0, "frequency_penalty": 0.0, "repetition_penalty": 1.0, "logit_bias": {}},
        {"response_format": {"type": "text"}, "parallel_tool_calls": True, "tool_choice": "auto", "tools": []},
        {"temperature": None, "top_p": None, "n": None, "stop": None, "seed": None, "tools": None, "stream": None},
        {"max_tokens": 5, "max_completion_tokens": 5, "stop": [], "top_k": 0, "seed": -1, "stream": False},
    ],
)
async def test_fields_that_change_nothing_are_accepted(serve: Any, fields: dict[str, Any]) -> None:
    response = await post(serve(["hi"]), {"model": MODEL, "messages": MESSAGES, **fields})
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["message"] == {"role": "assistant", "content": "hi"}


@pytest.mark.parametrize("body", [b"{broken", b"", b"[]", b"\xff"])
async def test_a_body_that_is_no_request(serve: Any, body: bytes) -> None:
    response = await post(serve([]), body)
    assert response.status_code == 400
    assert response.json()["error"]["message"]


async def test_wrong_key_model_and_path(serve: Any) -> None:
    served = serve([], api_key="sk-mine")
    assert served.endpoint.api_key == "sk-mine"
    async with served.client(api_key="sk-other") as client:
        with pytest.raises(openai.AuthenticationError) as wrong_key:
            await client.chat.completions.create(model=MODEL, messages=MESSAGES)
        assert wrong_key.value.code == "invalid_api_key"
    async with served.client() as client:
        with pytest.raises(openai.NotFoundError, match="`builtin/tiny`") as wrong_model:
            await client.chat.completions.create(model="gpt-4o", messages=MESSAGES)
        assert (wrong_model.value.code, wrong_model.value.param) == ("model_not_found", "model")
        with pytest.raises(openai.NotFoundError, match="/v1/embeddings is not served"):
            await client.embeddings.create(model=MODEL, input="x")
    async with httpx.AsyncClient() as anonymous:
        for method, path in (("POST", "/chat/completions"), ("GET", "/models")):
            response = await anonymous.request(method, served.endpoint.base_url + path)
            assert response.status_code == 401
        response = await anonymous.get(served.endpoint.base_url + "/chat/completions", headers=served.auth())
        assert response.status_code == 405


@pytest.mark.parametrize(
    "headers", [{"origin": "null"}, {"origin": "https://evil.example"}, {"sec-fetch-site": "cross-site"}]
)
async def test_a_web_page_is_kept_out_even_with_the_key(serve: Any, headers: dict[str, str]) -> None:
    served = serve([])
    async with httpx.AsyncClient(headers={**served.auth(), **headers}) as client:
        response = await client.get(f"{served.endpoint.base_url}/models")
    assert response.status_code == 403
    assert response.json()["error"]["type"] == "permission_error"


def test_generated_keys_differ(serve: Any) -> None:
    one, two = serve([]).endpoint.api_key, serve([]).endpoint.api_key
    assert one != two
    assert one.startswith("sk-evsys-")


async def test_a_refusal_cannot_act_on_a_terminal(serve: Any, caplog: pytest.LogCaptureFixture) -> None:
    served = serve([])
    with caplog.at_level(logging.WARNING):
        await post(served, {"model": MODEL, "messages": MESSAGES, "\x1b[2J": 1})
    assert "\x1b" not in caplog.text
    assert "␛[2J" in caplog.text


def test_the_key_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    policy = Policy(EvsysPolicyConfig(base_model=MODEL))
    with caplog.at_level(logging.DEBUG):
        endpoint = policy.endpoint
    url = endpoint.base_url
    endpoint.close()
    assert url in caplog.text
    assert endpoint.api_key not in caplog.text


@pytest.mark.parametrize("stream", [False, True])
async def test_a_long_prompt_is_a_400_with_both_lengths(serve: Any, renderer: ChatRenderer, stream: bool) -> None:
    served = serve(["x"], context_length=40)
    messages: list[Any] = [{"role": "user", "content": "word " * 60}]
    length = len(renderer.render(messages))
    served.recorder.open_run("run", "rollout", None)
    async with served.client(max_retries=2) as client:
        with pytest.raises(openai.BadRequestError) as error:
            await client.chat.completions.create(
                model=MODEL, messages=messages, stream=stream, extra_headers={RUN_ID_HEADER: "run"}
            )
    assert error.value.code == "context_length_exceeded"
    assert str(length) in error.value.message
    assert "40" in error.value.message
    assert len(served.sampling.requests) == 1  # no retry
    assert served.recorder.failures("run") == []  # the policy's own doing
    assert served.recorder.close_run("run") == []


@pytest.mark.parametrize("stream", [False, True])
async def test_an_engine_failure_that_a_retry_makes_good_costs_the_run_nothing(serve: Any, stream: bool) -> None:
    served = serve([EvsysError("out of memory"), ZeroDivisionError("a bug"), "done"])
    served.recorder.open_run("run", "rollout", 1)
    async with served.client(max_retries=2) as client:
        answer = await client.chat.completions.create(
            model=MODEL, messages=MESSAGES, stream=stream, extra_headers={RUN_ID_HEADER: "run"}
        )
        if stream:
            assert "".join([c.choices[0].delta.content or "" async for c in answer]) == "done"
    assert served.recorder.failures("run") == []
    assert served.recorder.totals.failures == 2
    (call,) = served.recorder.close_run("run")
    assert call.reply["content"] == "done"


async def test_statuses_of_failures(serve: Any) -> None:
    served = serve([EvsysError("e"), EngineClosedError("closed"), RuntimeError("bug")])
    statuses = [(await post(served, {"model": MODEL, "messages": MESSAGES})).status_code for _ in range(3)]
    assert statuses == [500, 503, 500]


async def test_a_model_that_cannot_be_loaded_is_not_retried(serve: Any) -> None:
    tries = []

    def load() -> Any:
        tries.append(1)
        raise ModelError("base_model `nope` is not a directory")

    served = serve([], get_client=load)
    async with served.client(max_retries=3) as client:
        with pytest.raises(openai.InternalServerError, match="base_model `nope`"):
            await client.chat.completions.create(model=MODEL, messages=MESSAGES)
    assert len(tries) == 1


async def test_loading_does_not_block_other_requests(serve: Any) -> None:
    release = threading.Event()

    def load() -> Any:
        release.wait(10)
        raise ModelError("loaded nothing")

    served = serve([], get_client=load)
    waiting = asyncio.create_task(post(served, {"model": MODEL, "messages": MESSAGES}))
    async with httpx.AsyncClient() as client:
        health = await client.get(served.endpoint.base_url.removesuffix("/v1") + "/health", timeout=5)
    assert health.status_code == 200
    assert not waiting.done()
    release.set()
    assert (await waiting).status_code == 500


async def test_an_error_in_the_middle_of_a_stream(serve: Any, tokenizer: Any) -> None:
    from nat_plugin_evsys.testing import ScriptedSamplingClient

    class BreaksOff(ScriptedSamplingClient):
        async def sample_async(self, *args: Any, **kwargs: Any) -> Any:
            await super().sample_async(*args, **kwargs)
            raise EvsysError("the engine broke off")

    served = serve(sampling_client=BreaksOff(tokenizer, ["some words"]))
    served.recorder.open_run("run", "rollout", None)
    async with served.client() as client:
        stream = await client.chat.completions.create(
            model=MODEL, messages=MESSAGES, stream=True, extra_headers={RUN_ID_HEADER: "run"}
        )
        with pytest.raises(openai.APIError, match="broke off"):
            _ = [chunk async for chunk in stream]
    assert len(served.recorder.failures("run")) == 1
    assert served.recorder.close_run("run") == []


async def test_a_client_that_goes_away_cancels_its_sampling(serve: Any) -> None:
    served = serve(lambda prompt: "word " * 30, token_delay=0.05)
    served.recorder.open_run("run", "rollout", None)
    async with served.client() as client:

        async def ask() -> None:
            await client.chat.completions.create(model=MODEL, messages=MESSAGES, extra_headers={RUN_ID_HEADER: "run"})

        asking = asyncio.create_task(ask())
        await until(lambda: served.sampling.requests)
        await asyncio.sleep(0.2)
        asking.cancel()
        await until(lambda: served.sampling.cancelled == 1)
        await until(lambda: served.recorder.totals.disconnected == 1)
    assert served.recorder.failures("run") == []
    assert served.recorder.close_run("run") == []


@pytest.mark.parametrize("choices", [1, 2])
async def test_a_stream_that_is_left_early_keeps_what_was_sent(serve: Any, renderer: Any, choices: int) -> None:
    served = serve(lambda prompt: "word " * 30, token_delay=0.02)
    served.recorder.open_run("run", "rollout", None)
    async with served.client() as client:
        stream = await client.chat.completions.create(
            model=MODEL,
            messages=MESSAGES,
            stream=True,
            n=choices,
            extra_headers={RUN_ID_HEADER: "run"},
            extra_body={"return_token_ids": True},
        )
        read: dict[int, list[int]] = {index: [] for index in range(choices)}
        async for chunk in stream:
            for choice in chunk.choices:
                read[choice.index] += getattr(choice, "token_ids", None) or []
            if all(len(ids) >= 3 for ids in read.values()):
                break
        await stream.close()
        assert await asyncio.to_thread(served.recorder.wait_until_answered, ["run"], 20.0)
    await until(lambda: served.sampling.cancelled == 1)
    calls = served.recorder.close_run("run")
    assert sorted(call.index for call in calls) == list(read)
    for call in calls:
        sampled = len(call.output_ids)
        assert call.output_ids[: len(read[call.index])] == read[call.index]
        assert call.logprobs == [-(1 + position) / 8 for position in range(sampled)]
        assert (call.stop_reason, call.reply["content"]) == ("length", renderer.decode(call.output_ids))
    assert served.recorder.totals.disconnected == 0


async def test_a_request_is_refused_and_counted(serve: Any) -> None:
    served = serve("fine", context_length=64)
    served.recorder.open_run("run", "rollout", None)
    headers = {RUN_ID_HEADER: "run"}
    async with served.client() as client:
        for change in ({"n": 0}, {"model": "nobody"}, {"messages": [{"role": "user", "content": "long " * 99}]}):
            request = {"model": MODEL, "messages": MESSAGES, "extra_headers": headers, **change}
            with pytest.raises(openai.APIStatusError):
                await client.chat.completions.create(**request)
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("nobody", extra_headers=headers)
    reasons = [refusal.reason for refusal in served.recorder.refusals("run")]
    assert reasons == ["request_refused", "request_refused", "prompt_too_long"]
    assert served.recorder.totals.refused == {"request_refused": 2, "prompt_too_long": 1}
    assert "context length is 64" in served.recorder.refusals("run")[-1].message


async def test_a_timeout_is_retried_without_a_double_record(serve: Any) -> None:
    served = serve(["slow " * 40, "fast"], token_delay=0.02)
    served.recorder.open_run("run", "rollout", None)
    async with served.client(max_retries=1, timeout=0.5) as client:
        answer = await client.chat.completions.create(
            model=MODEL, messages=MESSAGES, extra_headers={RUN_ID_HEADER: "run"}
        )
    assert answer.choices[0].message.content == "fast"
    await until(lambda: served.sampling.cancelled == 1)
    assert [call.reply["content"] for call in served.recorder.close_run("run")] == ["fast"]


@pytest.mark.parametrize("stream", [False, True])
async def test_closing_answers_what_is_in_flight(serve: Any, stream: bool) -> None:
    served = serve(lambda prompt: "word " * 30, token_delay=0.05)
    async with served.client() as client:

        async def ask() -> None:
            answer = await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=stream)
            if stream:
                _ = [chunk async for chunk in answer]

        asking = asyncio.create_task(ask())
        await until(lambda: served.sampling.requests)
        await asyncio.sleep(0.1)
        start = time.monotonic()
        await asyncio.to_thread(served.endpoint.close)
        assert time.monotonic() - start < 5
        with pytest.raises(openai.APIError, match="shutting down"):
            await asking
    assert served.sampling.cancelled == 1
    with pytest.raises(EvsysError, match="start"):
        _ = served.endpoint.base_url


def endpoint(port: int = 0) -> PolicyEndpoint:
    from nat_plugin_evsys.policy.recorder import Recorder

    def nothing(*args: Any) -> Any:
        raise AssertionError

    return PolicyEndpoint(
        renderer=nothing, sampling_client=nothing, recorder=Recorder(), defaults=nothing, model_names=["m"], port=port
    )


def test_a_taken_port_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"{port}.*`port`"):
            endpoint(port).start()
        policy = Policy(EvsysPolicyConfig(base_model=MODEL, port=port))
        for _ in range(2):
            with pytest.raises(ConfigError, match=f"{port}.*`port`"):
                _ = policy.endpoint
    assert policy.endpoint.base_url == f"http://127.0.0.1:{port}/v1"
    policy._stop_endpoint()


def test_an_endpoint_that_did_not_come_up_can_be_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def come_up_late(self: HttpServer) -> None:
        await asyncio.sleep(0.5)

    server = endpoint()
    with monkeypatch.context() as patch:
        patch.setattr(HttpServer, "run", come_up_late)
        patch.setattr(policy_endpoint, "_START_SECONDS", 0.1)
        with pytest.raises(EvsysError, match=r"did not start on 127\.0\.0\.1:\d+; see the log"):
            server.start()
    server.start()
    assert httpx.get(server.base_url.removesuffix("/v1") + "/health").status_code == 200
    server.close()


def test_start_and_close_can_be_repeated() -> None:
    server = endpoint()
    for _ in range(2):
        server.start()
        url = server.base_url
        server.start()
        assert server.base_url == url
        assert httpx.get(url.removesuffix("/v1") + "/health").status_code == 200
        server.close()
        server.close()
        with pytest.raises(httpx.ConnectError):
            httpx.get(url.removesuffix("/v1") + "/health")


def test_importing_the_endpoint_loads_no_torch() -> None:
    code = (
        "import sys, nat_plugin_evsys.policy.endpoint, nat_plugin_evsys.policy.client, nat_plugin_evsys.testing\n"
        "print([name for name in ('torch', 'transformers', 'tinker', 'openai', 'uvicorn') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.parametrize("reads", [False, True])
async def test_a_stream_that_nobody_reads_is_cut_and_recorded(
    serve: Any, renderer: Any, monkeypatch: Any, reads: bool
) -> None:
    monkeypatch.setattr(bounded_protocol, "UNREAD_SECONDS", 0.3)
    served = serve(lambda prompt: "word " * 600, token_delay=0.0)
    served.endpoint._server._listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    served.recorder.open_run("run", "rollout", None)
    body = {"model": MODEL, "messages": MESSAGES, "stream": True, "logprobs": True, "max_tokens": 600}
    host, port = served.endpoint._address
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect((host, port))
        data = json.dumps(body).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n{RUN_ID_HEADER}: run\r\nConnection: close\r\n"
        head += f"Authorization: {served.auth()['authorization']}\r\nContent-Length: {len(data)}\r\n\r\n"
        client.sendall(head.encode() + data)
        await until(lambda: served.sampling.requests)
        if reads:
            received = await asyncio.to_thread(lambda: b"".join(iter(lambda: client.recv(1 << 16), b"")))
            assert b"[DONE]" in received
        assert await asyncio.to_thread(served.recorder.wait_until_answered, ["run"], 20.0)
    (call,) = served.recorder.close_run("run")
    sampled = renderer.encode("word " * 600)
    assert call.output_ids == sampled[: len(call.output_ids)]
    assert call.stop_reason == "length"
    assert (len(call.output_ids) == 600) == reads


async def test_a_retry_makes_good_its_own_failures_alone(serve: Any) -> None:
    served = serve([EvsysError("first"), EvsysError("second"), "done"])
    served.recorder.open_run("run", "rollout", 1)
    headers = {RUN_ID_HEADER: "run"}
    async with served.client(max_retries=0) as client:
        with pytest.raises(openai.InternalServerError):
            await client.chat.completions.create(model=MODEL, messages=MESSAGES, extra_headers=headers)
    async with served.client(max_retries=1) as client:
        await client.chat.completions.create(model=MODEL, messages=MESSAGES, extra_headers=headers)
    assert [str(failure) for failure in served.recorder.failures("run")] == ["engine_error: first"]
