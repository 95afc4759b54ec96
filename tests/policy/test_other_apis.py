"""Completions, responses and tokenize, as OpenAI's own client reads them; all of them record calls as chat does."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import openai
import pytest

from nat_plugin_evsys.calls import RUN_ID_HEADER
from nat_plugin_evsys.errors import EvsysError
from nat_plugin_evsys.policy.chat import ChatRenderer
from nat_plugin_evsys.policy.client import open_langchain_client
from nat_plugin_evsys.testing import ScriptedSamplingClient

MODEL = "builtin/tiny"
CALL = 'Let me see.\n<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call>'
ADD = {
    "type": "function",
    "name": "add",
    "description": "Add two numbers.",
    "parameters": {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}},
    "strict": False,
}


def client_of(served: Any, run: str = "run") -> openai.AsyncOpenAI:
    served.recorder.open_run(run, "rollout", 1)
    client: openai.AsyncOpenAI = served.client(default_headers={RUN_ID_HEADER: run})
    return client


async def test_a_text_is_continued(serve: Any, renderer: ChatRenderer) -> None:
    served = serve(["the end. And more"] * 4)
    async with client_of(served) as client:
        for prompt in ("Once upon a time, ", renderer.encode("Once upon a time, ")):
            plain = await client.completions.create(
                model=MODEL,
                prompt=prompt,
                stop=[". And"],
                logprobs=2,
                max_tokens=30,
                extra_body={"return_token_ids": True},
            )
            stream = await client.completions.create(
                model=MODEL, prompt=prompt, stop=[". And"], max_tokens=30, stream=True
            )
            chunks = [chunk async for chunk in stream]
            assert plain.choices[0].text == "the end"
            assert "".join(chunk.choices[0].text for chunk in chunks) == "the end"
            assert (plain.choices[0].finish_reason, chunks[-1].choices[0].finish_reason) == ("stop", "stop")
            logprobs = plain.choices[0].logprobs
            assert "".join(logprobs.tokens).startswith("the end")
            assert [len(top) for top in logprobs.top_logprobs] == [2] * len(logprobs.tokens)
            assert len(logprobs.token_logprobs) == len(logprobs.text_offset) == len(plain.choices[0].token_ids)
    calls = served.recorder.close_run("run")
    assert [call.prompt_ids for call in calls] == [renderer.encode("Once upon a time, ")] * 4
    assert calls[0].output_ids == calls[1].output_ids


@pytest.mark.parametrize("as_ids", [False, True])
async def test_the_prompt_may_be_echoed(serve: Any, renderer: ChatRenderer, as_ids: bool) -> None:
    served = serve(["the end"] * 2)
    prompt: Any = renderer.encode("Once, ") if as_ids else "Once, "
    async with client_of(served) as client:
        plain = await client.completions.create(model=MODEL, prompt=prompt, echo=True)
        stream = await client.completions.create(model=MODEL, prompt=prompt, echo=True, stream=True)
        assert plain.choices[0].text == "Once, the end"
        assert "".join([chunk.choices[0].text async for chunk in stream if chunk.choices]) == "Once, the end"


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("completions", {"prompt": ""}, "one text or one list"),
        ("completions", {"prompt": ["a", "b"]}, "one text or one list"),
        ("completions", {"prompt": [1, -2]}, "one text or one list"),
        ("completions", {"prompt": [2**32]}, "one text or one list"),
        ("completions", {"prompt": "a", "suffix": "b"}, "suffix"),
        ("completions", {"prompt": "a", "logprobs": True}, "logprobs"),
        ("completions", {"prompt": "a", "bad_words": ["x"]}, "bad_words"),
        ("completions", [], "must be a JSON object"),
        ("completions", {"prompt": "a", "tools": [{}]}, "send a chat to /v1/chat/completions"),
        ("completions", {"prompt": "a", "messages": [{}]}, "`messages`"),
        ("responses", {"input": []}, "`input`"),
        ("responses", {"input": [{"type": "item_reference", "id": "x"}]}, "item_reference"),
        ("responses", {"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input_image"),
        ("responses", {"input": "a", "tools": [{"type": "web_search"}]}, "web_search"),
        ("responses", {"input": "a", "previous_response_id": "resp_1"}, "nothing is kept"),
        ("responses", {"input": "a", "colour": 1}, "colour"),
        ("responses", {"input": "a", "n": 2}, "`n`: a response is one reply"),
        ("responses", {"input": [{"role": "user", "content": [{"type": "input_text", "text": 5}]}]}, "of type int"),
        ("tokenize", {}, "either `prompt` or `messages`"),
        ("../inference/v1/generate", {"token_ids": []}, "`token_ids`"),
        ("../inference/v1/generate", {"token_ids": [2**32]}, "`token_ids`"),
        ("../inference/v1/generate", {"token_ids": [1], "stream": True}, "`stream`"),
        ("../inference/v1/generate", {"token_ids": [1], "tools": [{}]}, "the policy reads `token_ids` alone here"),
        ("../inference/v1/generate", {"token_ids": [1], "sampling_params": {"messages": [{}]}}, "`messages`"),
        ("../inference/v1/generate", {"token_ids": [1], "features": {"a": 1}}, "text tokens only"),
        ("../inference/v1/generate", {"token_ids": [1], "sampling_params": {"bad_words": ["x"]}}, "bad_words"),
    ],
)
async def test_what_is_refused_is_named(serve: Any, path: str, body: Any, words: str) -> None:
    served = serve([])
    sent = {"model": MODEL, **body} if isinstance(body, dict) else body
    async with httpx.AsyncClient(headers=served.auth()) as client:
        response = await client.post(f"{served.endpoint.base_url}/{path}", json=sent)
    assert response.status_code == 400, response.text
    assert words in response.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_continued_text_keeps_its_thoughts_and_calls(serve: Any, tokenizer: Any, stream: bool) -> None:
    text = f"<think>\nhm\n</think>\n\n{CALL}"
    renderer = ChatRenderer(tokenizer, chat_template=THOUGHTFUL + "{# <tool_call> #}", split_thoughts=True)
    served = serve([text], renderer=renderer)
    async with client_of(served) as client:
        body = {"model": MODEL, "prompt": "Q: 2 + 3", "max_tokens": 99}
        answer = await client.completions.create(**body, stream=stream)
        chunks = [chunk async for chunk in answer] if stream else [answer]
    assert "".join(chunk.choices[0].text for chunk in chunks) == text
    assert chunks[-1].choices[0].finish_reason == "stop"
    (call,) = served.recorder.close_run("run")
    assert call.reply == {"role": "assistant", "content": text}


async def test_a_continued_text_hides_special_tokens_where_chats_are_written_with_them(
    serve: Any, tokenizer: Any
) -> None:
    marked = ChatRenderer(tokenizer, chat_template=THOUGHTFUL + "{{ tools }}{# <|channel|>functions. #}")
    assert marked.writes_special_tokens
    served = serve(["one<|im_start|>two"] * 2, renderer=marked)
    async with client_of(served) as client:
        for skip, shown in ((True, "onetwo"), (False, "one<|im_start|>two")):
            body = {"model": MODEL, "prompt": "Q", "max_tokens": 99, "extra_body": {"skip_special_tokens": skip}}
            assert (await client.completions.create(**body)).choices[0].text == shown


async def test_generate_takes_and_gives_tokens(serve: Any, renderer: ChatRenderer) -> None:
    """As ``renderers.client.generate`` sends it, at vLLM's place."""
    served = serve(["Hello.", "Hello."])
    ids = renderer.render([{"role": "user", "content": "Hi"}])
    params = {"temperature": 1.0, "logprobs": 1, "max_tokens": 8, "stop_token_ids": [renderer.end_of_turn]}
    more = {"skip_special_tokens": False, "routed_experts_prompt_start": 3}
    body = {"model": MODEL, "token_ids": ids, "sampling_params": params | more, "cache_salt": "1"}
    served.recorder.open_run("run", "rollout", 1)
    async with httpx.AsyncClient(headers=served.auth() | {RUN_ID_HEADER: "run"}) as client:
        url = f"{served.endpoint.base_url.removesuffix('/v1')}/inference/v1/generate"
        answer = (await client.post(url, json=body)).json()
        short = (await client.post(url, json={**body, "sampling_params": params | {"max_tokens": 1}})).json()
    (choice,) = answer["choices"]
    (call, _) = served.recorder.close_run("run")
    assert call.prompt_ids == ids
    assert choice["token_ids"] == call.output_ids == [*renderer.encode("Hello."), renderer.end_of_turn]
    assert [entry["token"] for entry in choice["logprobs"]["content"]] == [f"token_id:{t}" for t in call.output_ids]
    assert [entry["logprob"] for entry in choice["logprobs"]["content"]] == call.logprobs
    assert [each["choices"][0]["finish_reason"] for each in (answer, short)] == ["stop", "length"]


async def test_tokens_are_those_that_the_policy_reads(serve: Any, renderer: ChatRenderer) -> None:
    served = serve([])
    messages = [{"role": "user", "content": "Hello there"}]
    async with httpx.AsyncClient(headers=served.auth(), base_url=served.endpoint.base_url) as client:
        text = await client.post("/tokenize", json={"model": MODEL, "prompt": "Hello", "return_token_strs": True})
        chat = await client.post("/tokenize", json={"model": MODEL, "messages": messages})
    assert text.json()["tokens"] == renderer.encode("Hello")
    assert "".join(text.json()["token_strs"]) == "Hello"
    assert chat.json() == {"count": len(renderer.render(messages)), "tokens": renderer.render(messages)}


@pytest.mark.parametrize(
    ("path", "field"), [("completions", "prompt"), ("../inference/v1/generate", "token_ids")], ids=["text", "generate"]
)
async def test_only_the_context_length_bounds_a_prompt_of_ids(serve: Any, path: str, field: str) -> None:
    served = serve([])
    async with httpx.AsyncClient(headers=served.auth()) as client:
        response = await client.post(
            f"{served.endpoint.base_url}/{path}", json={"model": MODEL, field: [40] * 60_000}, timeout=60
        )
    assert (response.status_code, response.json()["error"]["code"]) == (400, "context_length_exceeded")


async def test_long_answers_are_not_written_in_the_event_loop(serve: Any, tokenizer: Any) -> None:
    class OffLoop(ChatRenderer):
        def decode(self, ids: Any) -> str:
            with pytest.raises(RuntimeError, match="no running event loop"):
                asyncio.get_running_loop()
            return super().decode(ids)

    served = serve(["Hello."] * 2, renderer=OffLoop(tokenizer))
    messages: list[Any] = [{"role": "user", "content": "Hi"}]
    async with served.client() as client:
        answer = await client.chat.completions.create(model=MODEL, messages=messages, logprobs=True, top_logprobs=2)
        assert answer.choices[0].message.content == "Hello."
        text = await client.completions.create(model=MODEL, prompt="Hi", logprobs=2)
        assert text.choices[0].text == "Hello."
    async with httpx.AsyncClient(headers=served.auth(), base_url=served.endpoint.base_url) as http:
        tokens = await http.post("/tokenize", json={"model": MODEL, "prompt": "Hello", "return_token_strs": True})
    assert "".join(tokens.json()["token_strs"]) == "Hello"


async def test_a_response_is_text_and_calls(serve: Any, renderer: ChatRenderer) -> None:
    served = serve(["Hello.", CALL, "The sum is 5."])
    async with client_of(served) as client:
        first = await client.responses.create(model=MODEL, instructions="Be brief.", input="Hi", store=False)
        assert (first.status, first.output_text) == ("completed", "Hello.")
        assert first.usage.total_tokens == first.usage.input_tokens + first.usage.output_tokens
        question: list[Any] = [{"role": "user", "content": [{"type": "input_text", "text": "What is 2 + 3?"}]}]
        second = await client.responses.create(model=MODEL, input=question, tools=[ADD])
        assert [item.type for item in second.output] == ["message", "function_call"]
        call = second.output[1]
        assert (call.name, call.arguments) == ("add", '{"a": 2, "b": 3}')
        said = [item.model_dump(exclude_none=True) for item in second.output]
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "5"}
        third = await client.responses.create(model=MODEL, input=[*question, *said, result], tools=[ADD])
        assert third.output_text == "The sum is 5."
    calls = served.recorder.close_run("run")
    assert calls[0].prompt_ids == renderer.render(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    )
    # The items of one reply are one message again, so the prompt goes on where it ended.
    known = calls[1].prompt_ids + calls[1].output_ids
    assert calls[2].prompt_ids[: len(known)] == known
    assert calls[2].history == "extended"


async def test_a_response_is_streamed_as_its_client_expects(serve: Any) -> None:
    served = serve([CALL, "Hello.", "A long reply that is cut"])
    async with client_of(served) as client:
        async with client.responses.stream(model=MODEL, input="What is 2 + 3?", tools=[ADD]) as stream:
            kinds = [event.type async for event in stream]
            final = await stream.get_final_response()
        assert kinds[:3] == ["response.created", "response.in_progress", "response.output_item.added"]
        assert kinds[-1] == "response.completed"
        assert [item.type for item in final.output] == ["message", "function_call"]
        assert (final.output_text, final.output[1].arguments) == ("Let me see.", '{"a": 2, "b": 3}')
        events = [e async for e in await client.responses.create(model=MODEL, input="Hi", stream=True)]
        assert [event.sequence_number for event in events] == list(range(len(events)))
        assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "Hello."
        assert events[-1].response.usage.output_tokens > 0
        cut = await client.responses.create(model=MODEL, input="Hi", max_output_tokens=2)
        assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")


THOUGHTFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_response_has_its_reasoning_and_takes_it_back(serve: Any, tokenizer: Any, stream: bool) -> None:
    renderer = ChatRenderer(tokenizer, chat_template=THOUGHTFUL, split_thoughts=True)
    served = serve([f"<think>\n2 + 3\n</think>\n\n{CALL}", "Five."], renderer=renderer)
    question: list[Any] = [{"role": "user", "content": "What is 2 + 3?"}]
    async with client_of(served) as client:
        if stream:
            async with client.responses.stream(model=MODEL, input=question, tools=[ADD]) as events:
                kinds = [event.type async for event in events]
                first: Any = await events.get_final_response()
            assert {"response.reasoning_text.delta", "response.reasoning_text.done"} <= set(kinds)
        else:
            first = await client.responses.create(model=MODEL, input=question, tools=[ADD])
        assert [item.type for item in first.output] == ["reasoning", "message", "function_call"]
        assert ([part.text for part in first.output[0].content], first.output[0].summary) == (["2 + 3"], [])
        assert first.output_text == "Let me see."
        said = [item.model_dump(exclude_none=True) for item in first.output]
        result = {"type": "function_call_output", "call_id": first.output[2].call_id, "output": "5"}
        await client.responses.create(model=MODEL, input=[*question, *said, result], tools=[ADD])
    asked, again = served.recorder.close_run("run")
    assert again.messages[1]["reasoning_content"] == "2 + 3"
    assert [message["role"] for message in again.messages] == ["user", "assistant", "tool"]
    known = asked.prompt_ids + asked.output_ids
    assert again.prompt_ids[: len(known)] == known


async def test_an_error_of_a_streamed_response_has_its_status(serve: Any) -> None:
    served = serve([RuntimeError("broken")])
    async with client_of(served) as client:
        with pytest.raises(openai.InternalServerError, match="broken"):
            await client.responses.create(model=MODEL, input="Hi", stream=True)


async def test_an_error_in_the_middle_of_a_streamed_response_is_an_error_event(serve: Any, tokenizer: Any) -> None:
    class BreaksOff(ScriptedSamplingClient):
        async def sample_async(self, *args: Any, **kwargs: Any) -> Any:
            await super().sample_async(*args, **kwargs)
            raise EvsysError("the engine broke off")

    served = serve(sampling_client=BreaksOff(tokenizer, ["some words"] * 2))
    async with client_of(served) as client:
        last = [event async for event in await client.responses.create(model=MODEL, input="Hi", stream=True)][-1]
    assert (last.type, last.code, last.message, last.param) == ("error", "engine_error", "the engine broke off", None)
    async with open_langchain_client(
        served.endpoint, model=MODEL, timeout=30, disable_streaming=False, use_responses_api=True
    ) as llm:
        with pytest.raises(ValueError, match="broke off"):
            _ = [chunk async for chunk in llm.astream("Hi")]


async def test_langchain_agents_call_responses_where_the_api_type_says_so(serve: Any) -> None:
    from langchain_core.messages import HumanMessage, ToolMessage

    served = serve([CALL, "The sum is 5."])
    served.recorder.open_run("run", "rollout", 1)
    async with open_langchain_client(
        served.endpoint, model=MODEL, timeout=30, disable_streaming=True, use_responses_api=True
    ) as llm:
        assert llm.use_responses_api, "NAT's responses_api_agent asserts it"
        tool = {"type": "function", "function": {k: v for k, v in ADD.items() if k not in ("type", "strict")}}
        bound = llm.bind_tools([tool], parallel_tool_calls=False, strict=True)
        messages: list[Any] = [HumanMessage("What is 2 + 3?")]
        reply = await bound.ainvoke(messages)
        assert [(call["name"], call["args"]) for call in reply.tool_calls] == [("add", {"a": 2, "b": 3})]
        messages += [reply, ToolMessage("5", tool_call_id=reply.tool_calls[0]["id"])]
        answer = await bound.ainvoke(messages)
        assert answer.text == "The sum is 5."
