"""What the endpoint answers and records, driven by the real OpenAI SDK."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import httpx
import pytest

from nat_plugin_evsys.calls import RUN_ID_HEADER, STEP_ID_HEADER, Call
from nat_plugin_evsys.policy.chat import ChatRenderer

MODEL = "builtin/tiny"
MESSAGES: list[Any] = [{"role": "user", "content": "What is 2 + 3?"}]
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call>'
IDS = {"return_token_ids": True}


def run_headers(run: str, step: str = "step-1") -> dict[str, str]:
    return {RUN_ID_HEADER: run, STEP_ID_HEADER: step}


def without_ids(call: Call) -> Call:
    """The call without what is different in every request."""
    reply = json.loads(json.dumps(call.reply))
    for tool_call in reply.get("tool_calls", []):
        tool_call["id"] = ""
    return replace(call, call_id="", sequence=0, reply=reply)


async def test_a_plain_call_and_its_record(serve: Any, renderer: ChatRenderer) -> None:
    served = serve(["The sum is 5."], policy_version=7)
    served.recorder.open_run("run", "rollout", 11)
    async with served.client() as client:
        answer = await client.chat.completions.create(
            model=MODEL, messages=MESSAGES, extra_body=IDS, extra_headers=run_headers("run")
        )
    (call,) = served.recorder.close_run("run")
    output = [*renderer.tokenizer("The sum is 5.")["input_ids"], renderer.tokenizer.eos_token_id]
    assert answer.choices[0].message.content == "The sum is 5."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].logprobs is None
    assert answer.model == MODEL
    assert answer.system_fingerprint == "policy-7"
    assert answer.id.startswith("chatcmpl-")
    prompt_ids = answer.model_extra["prompt_token_ids"]
    assert call.prompt_ids == prompt_ids == renderer.render(MESSAGES) == served.sampling.requests[0].prompt_ids
    assert call.output_ids == answer.choices[0].model_extra["token_ids"] == output
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt_ids), len(output))
    assert answer.usage.total_tokens == len(prompt_ids) + len(output)
    assert call.logprobs == [-(1 + n) / 8 for n in range(len(output))]
    assert (call.call_id, call.index, call.run_id, call.step_id) == (answer.id, 0, "run", "step-1")
    assert (call.policy_version, call.stop_reason, call.temperature, call.top_p) == (7, "stop", 1.0, 1.0)
    assert (call.messages, call.tools) == (MESSAGES, [])
    assert call.reply == {"role": "assistant", "content": "The sum is 5."}


async def test_token_ids_only_when_asked(serve: Any) -> None:
    served = serve(["Hi"] * 2)
    async with httpx.AsyncClient(headers=served.auth()) as client:
        url = f"{served.endpoint.base_url}/chat/completions"
        answer = (await client.post(url, json={"model": MODEL, "messages": MESSAGES})).json()
        assert "prompt_token_ids" not in answer
        assert "token_ids" not in answer["choices"][0]
        stream = (await client.post(url, json={"model": MODEL, "messages": MESSAGES, "stream": True})).text
        assert "token_ids" not in stream
        assert "usage" not in stream


STREAMED = {
    "text": ("The sum is 5 — grüße 🎉.", {}),
    "tool call": (f"Let me add.\n{CALL}", {"tools": True}),
    "two tool calls": (f"{CALL}\n{CALL}", {"tools": True}),
    "malformed tool call": ("<tool_call>{broken</tool_call>", {"tools": True}),
    "lone surrogate": ('<tool_call>{"name":"say","arguments":{"t":"\\ud83d"}}</tool_call>', {"tools": True}),
    "overflowing number": ('<tool_call>{"name":"f","arguments":{"a":1e400}}</tool_call>', {"tools": True}),
    "unclosed tool call": ('<tool_call>{"name":"f","arguments":{"a":1}}', {"tools": True}),
    "tool call without tools": (CALL, {}),
    "stop string": ("Thought: add\nObservation: 5 is next", {"stop": ["Observation:", "never"]}),
    "almost a stop string": ("Thought: Obser", {"stop": "Observation:"}),
    "cut off": ("one two three four five six seven eight nine ten", {"max_tokens": 4}),
    "cut off in a tool call": (CALL, {"tools": True, "max_tokens": 8}),
    "nothing": ("", {}),
    "control token inside": ("a<|im_start|>b", {}),
    "log-probabilities": ("The sum", {"logprobs": True}),
    "log-probabilities asked for by 1": ("The sum", {"logprobs": 1}),
    "top log-probabilities": ("The sum", {"logprobs": True, "top_logprobs": 3}),
    "two choices": ("The sum is 5.", {"n": 2}),
}


@pytest.mark.parametrize("case", STREAMED)
async def test_a_stream_is_the_plain_reply(serve: Any, add_tool: Any, case: str) -> None:
    text, options = STREAMED[case]
    options = {**options, "tools": [add_tool]} if options.get("tools") else options
    served = serve(lambda prompt: text)
    served.recorder.open_run("run", "rollout", None)
    request: dict[str, Any] = dict(
        model=MODEL, messages=MESSAGES, extra_body=IDS, extra_headers=run_headers("run"), **options
    )
    async with served.client() as client:
        plain = await client.chat.completions.create(**request)
        stream = await client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True})
        chunks = [chunk async for chunk in stream]
    calls = served.recorder.close_run("run")
    n = options.get("n", 1)
    assert [without_ids(call) for call in calls[:n]] == [without_ids(call) for call in calls[n:]]
    assert len({(chunk.id, chunk.created, chunk.model, chunk.system_fingerprint) for chunk in chunks}) == 1
    assert chunks[-1].choices == []
    assert chunks[-1].usage == plain.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    for choice, call in zip(plain.choices, calls[n:], strict=True):
        parts = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert parts[0].delta.role == "assistant"
        assert [part.finish_reason for part in parts] == [None] * (len(parts) - 1) + [choice.finish_reason]
        assert "".join(part.delta.content or "" for part in parts) == (choice.message.content or "")
        assert [i for part in parts for i in part.model_extra.get("token_ids") or []] == call.output_ids
        deltas = [delta for part in parts for delta in part.delta.tool_calls or []]
        assert [delta.index for delta in deltas] == list(range(len(deltas)))
        assert [delta.function.arguments for delta in deltas] == [
            tool_call.function.arguments for tool_call in choice.message.tool_calls or []
        ]
        assert [delta.id for delta in deltas] == [t["id"] for t in call.reply.get("tool_calls", [])]
        streamed = [entry for part in parts if part.logprobs for entry in part.logprobs.content]
        assert streamed == (choice.logprobs.content if choice.logprobs else [])
    first = next(chunk for chunk in chunks if chunk.choices)
    assert first.model_extra["prompt_token_ids"] == plain.model_extra["prompt_token_ids"]


@pytest.mark.parametrize(
    ("case", "content", "finish"),
    [
        ("tool call", "Let me add.", "tool_calls"),
        ("two tool calls", None, "tool_calls"),
        ("malformed tool call", "<tool_call>{broken</tool_call>", "stop"),
        ("lone surrogate", '<tool_call>{"name":"say","arguments":{"t":"\\ud83d"}}</tool_call>', "stop"),
        ("overflowing number", '<tool_call>{"name":"f","arguments":{"a":1e400}}</tool_call>', "stop"),
        ("unclosed tool call", None, "tool_calls"),
        ("tool call without tools", CALL, "stop"),
        ("stop string", "Thought: add\n", "stop"),
        ("almost a stop string", "Thought: Obser", "stop"),
        ("cut off", "one two three", "length"),
        ("nothing", "", "stop"),
        ("control token inside", "a<|im_start|>b", "stop"),
    ],
)
async def test_content_and_finish_reason(serve: Any, add_tool: Any, case: str, content: Any, finish: str) -> None:
    text, options = STREAMED[case]
    options = {**options, "tools": [add_tool]} if options.get("tools") else options
    async with serve([text]).client() as client:
        answer = await client.chat.completions.create(model=MODEL, messages=MESSAGES, **options)
    message = answer.choices[0].message
    if case == "cut off":
        assert message.content
        assert text.startswith(message.content)
        assert answer.usage.completion_tokens == 4
    else:
        assert message.content == content
    assert answer.choices[0].finish_reason == finish
    assert len(message.tool_calls or []) == {"tool call": 1, "unclosed tool call": 1, "two tool calls": 2}.get(case, 0)


async def test_content_arrives_as_it_is_sampled(serve: Any) -> None:
    async with serve(["one two three four five"], token_delay=0.05).client() as client:
        stream = await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
        loop = asyncio.get_running_loop()
        times = [loop.time() async for chunk in stream if chunk.choices[0].delta.content]
    assert len(times) >= 4
    assert times[-1] - times[0] > 0.1


async def test_a_tool_calls_round_trip(serve: Any, add_tool: Any, renderer: ChatRenderer) -> None:
    served = serve([f"Let me add.\n{CALL}", "5"])
    async with served.client() as client:
        first = await client.chat.completions.create(model=MODEL, messages=MESSAGES, tools=[add_tool])
        reply = first.choices[0].message
        (tool_call,) = reply.tool_calls
        assert json.loads(tool_call.function.arguments) == {"a": 2, "b": 3}
        history = [*MESSAGES, reply.model_dump(), {"role": "tool", "tool_call_id": tool_call.id, "content": "5"}]
        await client.chat.completions.create(model=MODEL, messages=history, tools=[add_tool])
    one, two = served.sampling.requests
    # What was sampled comes back in the history id for id, so the second prompt extends the first call.
    sampled = renderer.tokenizer(f"Let me add.\n{CALL}<|im_end|>", add_special_tokens=False)["input_ids"]
    assert two.prompt_ids[: len(one.prompt_ids) + len(sampled)] == one.prompt_ids + sampled


async def test_tool_choice_none_hides_the_tools(serve: Any, add_tool: Any, renderer: ChatRenderer) -> None:
    served = serve([CALL])
    served.recorder.open_run("run", "rollout", None)
    async with served.client() as client:
        answer = await client.chat.completions.create(
            model=MODEL, messages=MESSAGES, tools=[add_tool], tool_choice="none", extra_headers=run_headers("run")
        )
    assert served.sampling.requests[0].prompt_ids == renderer.render(MESSAGES)
    assert (answer.choices[0].message.content, answer.choices[0].message.tool_calls) == (CALL, None)
    assert served.recorder.close_run("run")[0].tools == []


async def test_choices_are_recorded_one_by_one(serve: Any) -> None:
    served = serve(["one", "two", "three"])
    served.recorder.open_run("run", "rollout", None)
    async with served.client() as client:
        answer = await client.chat.completions.create(
            model=MODEL, messages=MESSAGES, n=3, extra_headers=run_headers("run")
        )
    calls = served.recorder.close_run("run")
    assert [choice.message.content for choice in answer.choices] == ["one", "two", "three"]
    assert [(call.call_id, call.index, call.reply["content"]) for call in calls] == [
        (answer.id, 0, "one"),
        (answer.id, 1, "two"),
        (answer.id, 2, "three"),
    ]
    assert answer.usage.completion_tokens == sum(len(call.output_ids) for call in calls)


async def test_logprobs(serve: Any, renderer: ChatRenderer) -> None:
    async with serve(["Grüße 🎉"]).client() as client:
        answer = await client.chat.completions.create(
            model=MODEL, messages=MESSAGES, logprobs=True, top_logprobs=2, extra_body=IDS
        )
    choice = answer.choices[0]
    entries = choice.logprobs.content
    assert len(entries) == len(choice.model_extra["token_ids"])
    assert b"".join(bytes(entry.bytes) for entry in entries) == "Grüße 🎉<|im_end|>".encode()
    assert [entry.logprob for entry in entries] == [-(1 + n) / 8 for n in range(len(entries))]
    assert all(len(entry.top_logprobs) == 2 for entry in entries)
    assert all(entry.top_logprobs[0].token == entry.token for entry in entries)
    assert entries[0].top_logprobs[1].logprob == -9999.0


async def test_sampling_settings_reach_the_sampler(serve: Any) -> None:
    served = serve(["x"] * 3)
    served.recorder.open_run("train", "rollout", 3)
    async with served.client() as client:
        await client.chat.completions.create(
            model=MODEL,
            messages=MESSAGES,
            temperature=0.7,
            top_p=0.9,
            max_completion_tokens=5,
            seed=42,
            stop=["END"],
            extra_body={"top_k": 8},
            extra_headers=run_headers("train"),
        )
        await client.chat.completions.create(model=MODEL, messages=MESSAGES, extra_headers=run_headers("train"))
        await client.chat.completions.create(model=MODEL, messages=MESSAGES)
    stated, rollout, other = (request.params for request in served.sampling.requests)
    assert (stated.temperature, stated.top_p, stated.top_k, stated.max_tokens, stated.seed) == (0.7, 0.9, 8, 5, 42)
    assert stated.stop == ["END"]
    assert (rollout.temperature, rollout.top_k, rollout.max_tokens) == (1.0, -1, 64)
    assert rollout.stop == [served.sampling._tokenizer.eos_token_id]
    assert (other.temperature, other.seed) == (0.0, None)
    calls = served.recorder.close_run("train")
    assert [(call.temperature, call.top_p) for call in calls] == [(0.7, 0.9), (1.0, 1.0)]


async def test_seeds_come_from_the_run(serve: Any) -> None:
    async def seeds(served: Any, runs: list[str]) -> dict[str, list[int]]:
        served.recorder.open_run("a", "rollout", 1)
        served.recorder.open_run("b", "rollout", 2)
        given: dict[str, list[int]] = {}
        async with served.client() as client:
            for run in runs:
                await client.chat.completions.create(model=MODEL, messages=MESSAGES, extra_headers=run_headers(run))
                given.setdefault(run, []).append(served.sampling.requests[-1].params.seed)
        return given

    one = await seeds(serve(lambda prompt: "x"), ["a", "a", "b", "b"])
    assert one == await seeds(serve(lambda prompt: "x"), ["b", "a", "b", "a"])
    assert len({seed for run in one.values() for seed in run}) == 4


async def test_thirty_two_at_once(serve: Any, renderer: ChatRenderer) -> None:
    served = serve(lambda prompt: renderer.decode(prompt).split("say ")[1].split("<")[0], token_delay=0.002)
    for n in range(32):
        served.recorder.open_run(f"run {n}", "rollout", n)
    async with served.client() as client:

        async def ask(n: int) -> str:
            options: Any = {"stream": True} if n % 2 else {}
            answer = await client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": f"say number {n} please"}],
                extra_headers=run_headers(f"run {n}", f"step {n}"),
                **options,
            )
            if n % 2:
                return "".join([chunk.choices[0].delta.content or "" async for chunk in answer])
            return answer.choices[0].message.content

        texts = await asyncio.gather(*map(ask, range(32)))
    assert texts == [f"number {n} please" for n in range(32)]
    for n in range(32):
        (call,) = served.recorder.close_run(f"run {n}")
        assert (call.reply["content"], call.step_id) == (f"number {n} please", f"step {n}")


async def test_calls_of_no_run_are_answered_and_counted(serve: Any) -> None:
    served = serve(["x"] * 3)
    async with served.client() as client:
        await client.chat.completions.create(model=MODEL, messages=MESSAGES)
        served.recorder.open_run("run", "rollout", None)
        await client.chat.completions.create(model=MODEL, messages=MESSAGES)
        await client.chat.completions.create(model=MODEL, messages=MESSAGES, extra_headers=run_headers("other"))
    assert served.recorder.totals.unattributed == 2
    assert served.recorder.close_run("run") == []


async def test_a_new_policy_version_is_served_at_the_next_request(serve: Any, tokenizer: Any) -> None:
    from nat_plugin_evsys.testing import ScriptedSamplingClient

    clients = [
        ScriptedSamplingClient(tokenizer, lambda prompt: "a b c d e f", policy_version=0, token_delay=0.05),
        ScriptedSamplingClient(tokenizer, lambda prompt: "new", policy_version=1),
    ]
    current = [clients[0]]

    async def get_client() -> Any:  # async sources are allowed too
        return current[0]

    served = serve(sampling_client=clients[0], get_client=get_client)
    served.recorder.open_run("run", "rollout", None)
    async with served.client() as client:
        old = asyncio.create_task(
            client.chat.completions.create(model=MODEL, messages=MESSAGES, extra_headers=run_headers("run"))
        )
        while not clients[0].requests:  # noqa: ASYNC110 - filled from another thread
            await asyncio.sleep(0.01)
        current[0] = clients[1]
        new = await client.chat.completions.create(model=MODEL, messages=MESSAGES, extra_headers=run_headers("run"))
        assert not old.done()
        assert (await old).system_fingerprint == "policy-0"
        assert new.system_fingerprint == "policy-1"
    calls = served.recorder.close_run("run")
    assert [(call.policy_version, call.reply["content"]) for call in calls] == [(1, "new"), (0, "a b c d e f")]


async def test_models_and_health(serve: Any) -> None:
    served = serve([])
    async with served.client() as client:
        assert [model.id async for model in client.models.list()] == [MODEL]
    async with httpx.AsyncClient() as plain:
        root = served.endpoint.base_url.removesuffix("/v1")
        assert (await plain.get(f"{root}/health")).json() == {"status": "ok"}
        name = await plain.get(f"{served.endpoint.base_url}/models/{MODEL}", headers=served.auth())
        assert name.json()["id"] == MODEL


OPENED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{% if m.role == 'assistant' and not m.reasoning_content %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '\n' }}</think>\n\n{% endif %}{% endif %}"
)
"""Opens a ``<think>`` block unless told not to."""


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("default", [None, False])
async def test_a_request_that_sets_thinking_has_its_reply_read_so(
    serve: Any, tokenizer: Any, default: bool | None, stream: bool
) -> None:
    split = ChatRenderer(tokenizer, chat_template=OPENED, enable_thinking=default, split_thoughts=True)
    turns = [*MESSAGES, {"role": "assistant", "content": "Four."}, {"role": "user", "content": "Sure?"}]
    for thinks, text, thoughts in ((False, "Four.", ""), (True, "2 + 2\n</think>\n\nFour.", "2 + 2")):
        served = serve([text, text], renderer=split)
        served.recorder.open_run("run", "rollout", 7)
        async with served.client(default_headers=run_headers("run")) as client:
            for messages in (MESSAGES, turns):
                answer = await client.chat.completions.create(
                    model=MODEL,
                    messages=messages,
                    stream=stream,
                    extra_body={"chat_template_kwargs": {"enable_thinking": thinks}},
                )
                parts = [c.choices[0].delta async for c in answer] if stream else [answer.choices[0].message]
                content, reasoning = (
                    "".join(getattr(part, name, None) or "" for part in parts).strip()
                    for name in ("content", "reasoning_content")
                )
                assert (content, reasoning) == ("Four.", thoughts)
        first, second = served.recorder.close_run("run")
        assert second.history == "extended"
        assert second.prompt_ids[: len(first.prompt_ids + first.output_ids)] == first.prompt_ids + first.output_ids
