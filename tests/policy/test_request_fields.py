"""Every field that OpenAI's SDK can send has a place in the table of fields, and gets what the table says."""

from __future__ import annotations

import logging
from typing import Any

import httpx
import pytest
from openai.types import chat
from openai.types.chat import completion_create_params
from openai.types.shared_params import FunctionDefinition

from nat_plugin_evsys.calls import RUN_ID_HEADER
from nat_plugin_evsys.errors import ApiError
from nat_plugin_evsys.policy import request_fields
from nat_plugin_evsys.policy.request import ChatCompletionRequest
from nat_plugin_evsys.policy.request_fields import HONOURED, IGNORED, REFUSED, read_fields

MODEL = "builtin/tiny"
BODY: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}


def typed_names(params: Any) -> set[str]:
    return set(params.__required_keys__ | params.__optional_keys__)


def test_the_table_knows_every_field_of_the_sdk_once() -> None:
    sent = typed_names(completion_create_params.CompletionCreateParamsNonStreaming)
    assert sent - HONOURED - IGNORED - set(REFUSED) == set()
    assert not HONOURED & IGNORED
    assert not (HONOURED | IGNORED) & set(REFUSED)
    assert set(ChatCompletionRequest.model_fields) == HONOURED
    assert typed_names(FunctionDefinition) == request_fields._FUNCTION_FIELDS
    assert typed_names(chat.ChatCompletionFunctionToolParam) == request_fields._TOOL_FIELDS


def test_a_refused_field_is_taken_at_its_neutral_values() -> None:
    for name, rule in REFUSED.items():
        for value in (None, *rule.neutral):
            assert read_fields({**BODY, name: value}).body == BODY
        with pytest.raises(ApiError, match=name) as error:
            read_fields({**BODY, name: ["not neutral"]})
        assert error.value.param == name
        assert rule.why in error.value.message


@pytest.mark.parametrize("name", sorted(IGNORED))
def test_an_ignored_field_is_named(name: str) -> None:
    read = read_fields({**BODY, name: "x"})
    assert (read.body, read.ignored) == (BODY, (name,))
    assert read_fields({**BODY, name: None}).ignored == ()


def test_what_clients_echo_is_ignored_and_named() -> None:
    function = {"name": "add", "arguments": "{}", "parsed_arguments": {}}
    call = {"id": "c", "type": "function", "function": function, "provider_specific_fields": {"a": 1}}
    reply = {
        "role": "assistant",
        "content": "Yes.",
        "tool_calls": [call],
        **{"refusal": None, "annotations": [], "audio": None, "function_call": None, "parsed": {"a": 1}},
        **{"reasoning": "hm", "thinking_blocks": [{}], "provider_specific_fields": {"b": 2}, "cache_control": {"c": 3}},
    }
    tool = {
        "type": "function",
        "cache_control": {"d": 4},
        "function": {"name": "add", "strict": True, "returns": "int"},
    }
    request = ChatCompletionRequest.parse({**BODY, "messages": [*BODY["messages"], reply], "tools": [tool]})
    kept = {"id": "c", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    assert request.message_dicts()[1] == {"role": "assistant", "content": "Yes.", "tool_calls": [kept]}
    assert request.shown_tools == [{"type": "function", "function": {"name": "add"}}]
    assert set(request.ignored) == {
        "messages[].parsed",
        "messages[].reasoning",
        "messages[].thinking_blocks",
        "messages[].provider_specific_fields",
        "messages[].cache_control",
        "tool_calls[].provider_specific_fields",
        "tools[].cache_control",
        "tools[].function.returns",
    }
    assert request.hints == ("tools[].function.strict",)


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
HINTS: list[tuple[str, dict[str, Any]]] = [
    ("tool_choice", {"tools": [TOOL], "tool_choice": "required"}),
    ("tool_choice", {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "add"}}}),
    ("parallel_tool_calls", {"tools": [TOOL], "parallel_tool_calls": False}),
    ("response_format", {"response_format": {"type": "json_object"}}),
    ("response_format", {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}}}}),
    ("tools[].function.strict", {"tools": [{**TOOL, "function": {**TOOL["function"], "strict": True}}]}),
]


@pytest.mark.parametrize(("name", "fields"), HINTS)
async def test_hints_are_followed_as_the_setting_says(serve: Any, caplog: Any, name: str, fields: Any) -> None:
    # A script cannot be constrained, so `honour` says so once.
    for mode, status in (("honour", 200), ("ignore", 200), ("refuse", 400)):
        served = serve(["fine"] * 2, hints=mode)
        caplog.clear()
        async with httpx.AsyncClient(headers=served.auth()) as client:
            for _ in range(2):
                response = await client.post(f"{served.endpoint.base_url}/chat/completions", json={**BODY, **fields})
                assert response.status_code == status, response.text
        said = [record for record in caplog.records if name in record.getMessage() and record.name.endswith("routes")]
        assert len(said) == 1
        assert said[0].levelno == logging.WARNING


async def test_a_refusal_is_said_once_per_kind_and_counted(serve: Any, caplog: Any) -> None:
    served = serve([])
    served.recorder.open_run("run", "rollout", None)
    bodies = [{**BODY, "bad_words": ["x"]}, *({**BODY, "n": n} for n in (0, -1)), {**BODY, "max_tokens": -7}]
    async with httpx.AsyncClient(headers={**served.auth(), RUN_ID_HEADER: "run"}) as client:
        for body in bodies * 2:
            assert (await client.post(f"{served.endpoint.base_url}/chat/completions", json=body)).status_code == 400
    totals = served.recorder.totals
    assert list(totals.refusals.values()) == [2, 4, 2]
    assert "training needs the model's own distribution" in next(iter(totals.refusals))
    assert sum(totals.refused.values()) == 8
    assert len([record for record in caplog.records if "was refused (400)" in record.getMessage()]) == 3


async def test_tokens_may_be_named_by_id_and_end_a_reply(serve: Any, tokenizer: Any) -> None:
    for token, stops in (("b", {}), ("<tool_call>", {"stop": ["zzz"]})):
        stop = tokenizer(token, add_special_tokens=False)["input_ids"][0]
        served = serve([f"a{token}c"])
        async with served.client() as client:
            reply = await client.chat.completions.create(
                **BODY,
                **stops,
                logprobs=True,
                extra_body={"return_token_ids": True, "return_tokens_as_token_ids": True, "stop_token_ids": [stop]},
            )
        (choice,) = reply.choices
        assert choice.token_ids[-1] == stop
        assert [entry.token for entry in choice.logprobs.content] == [f"token_id:{i}" for i in choice.token_ids]
        assert choice.finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_may_stay_and_the_end_be_ignored(serve: Any, tokenizer: Any, stream: bool) -> None:
    served = serve(["one. two. three", [*tokenizer.encode("one"), tokenizer.eos_token_id, *tokenizer.encode(" two")]])
    for fields, text, finish in (
        ({"stop": [". ", "three"], "extra_body": {"include_stop_str_in_output": True}}, "one. ", "stop"),
        ({"extra_body": {"ignore_eos": True}, "max_tokens": 3}, "one<|im_end|> two", "length"),
    ):
        async with served.client() as client:
            answer = await client.chat.completions.create(**BODY, **fields, stream=stream)
            if stream:
                choices = [chunk.choices[0] async for chunk in answer]
                seen = "".join(choice.delta.content or "" for choice in choices)
            else:
                choices, seen = answer.choices, answer.choices[0].message.content
        assert (seen, choices[-1].finish_reason) == (text, finish)
    assert served.sampling.requests[1].params.stop == []
    with pytest.raises(ApiError, match="ignore_eos"):
        ChatCompletionRequest.parse({**BODY, "ignore_eos": True, "stop": ["x"]})
