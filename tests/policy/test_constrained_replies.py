"""Requests that ask for a form of the reply, in front of the engine's own sampler and a random (tiny) model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from tiny import tiny_model

from nat_plugin_evsys.calls import RUN_ID_HEADER, Call
from nat_plugin_evsys.engine.model.loading import wrap_model
from nat_plugin_evsys.engine.sampler import Sampler
from nat_plugin_evsys.policy.chat import ChatRenderer
from nat_plugin_evsys.policy.reply_forms import ReplyForms
from nat_plugin_evsys.policy.request import ChatCompletionRequest
from nat_plugin_evsys.policy.tool_forms.families import FORMS as FAMILIES
from nat_plugin_evsys.policy.tool_forms.form import ToolForm

MODEL = "builtin/tiny"
MESSAGES: list[Any] = [{"role": "user", "content": "Where does it go?"}]
ROUTE = {
    "type": "object",
    "properties": {"team": {"enum": ["billing", "network", "café"]}, "urgent": {"type": "boolean"}},
    "required": ["team", "urgent"],
    "additionalProperties": False,
}
LEVEL = {
    "type": "object",
    "properties": {"level": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["level"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "route", "strict": True, "parameters": ROUTE}},
    {"type": "function", "function": {"name": "rate", "parameters": LEVEL}},
]
NAMED = {"type": "function", "function": {"name": "rate"}}
ONE_CALL: dict[str, Any] = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
SCHEMA: dict[str, Any] = {"response_format": {"type": "json_schema", "json_schema": {"name": "r", "schema": ROUTE}}}


@pytest.fixture(scope="module")
def sampler(tokenizer: Any) -> Iterator[Sampler]:
    shape = {"vocab_size": len(tokenizer), "max_position_embeddings": 4096, "tie_word_embeddings": False}
    model = tiny_model("qwen3", **shape, eos_token_id=tokenizer.eos_token_id)
    sampler = Sampler(wrap_model(MODEL, model, tokenizer), prefix_cache_bytes=0)
    yield sampler
    sampler.close()


@pytest.fixture
def served(serve: Any, sampler: Sampler) -> Any:
    return serve(sampling_client=sampler.client(None, policy_version=3), hints="honour")


async def ask(served: Any, **options: Any) -> tuple[dict[str, Any], str, Call]:
    """The message, the reason why it ended, and the recorded call, of a rollout of one turn."""
    served.recorder.open_run("run", "rollout", 7)
    message, finish = await take_turn(served, **options)
    (call,) = served.recorder.close_run("run")
    return message, finish, call


async def take_turn(served: Any, *, stream: bool = False, **options: Any) -> tuple[dict[str, Any], str]:
    """The message, and the reason why it ended, of the rollout that is open."""
    request = {"model": MODEL, "messages": MESSAGES, "temperature": 1.0, "max_tokens": 200, **options}
    async with served.client(default_headers={RUN_ID_HEADER: "run"}) as client:
        answer = await client.chat.completions.create(stream=stream, **request)
        if stream:
            chunks = [chunk.choices[0] async for chunk in answer]
            calls = [call.model_dump() for chunk in chunks for call in chunk.delta.tool_calls or ()]
            message = {"content": "".join(chunk.delta.content or "" for chunk in chunks), "tool_calls": calls}
            finish = chunks[-1].finish_reason
        else:
            message, finish = answer.choices[0].message.model_dump(), answer.choices[0].finish_reason
    return message, finish


def functions(message: dict[str, Any]) -> list[tuple[str, Any]]:
    calls = [call["function"] for call in message["tool_calls"] or ()]
    return [(call["name"], json.loads(call["arguments"])) for call in calls]


def fits(name: str, arguments: Any) -> bool:
    if name == "rate":
        return set(arguments) == {"level"} and 0 <= arguments["level"] <= 9
    return list(arguments) == ["team", "urgent"] and arguments["team"] in ROUTE["properties"]["team"]["enum"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_required_call_is_made_and_its_beginning_is_in_the_prompt(
    served: Any, renderer: ChatRenderer, stream: bool
) -> None:
    message, finish, call = await ask(served, stream=stream, **ONE_CALL)
    ((name, arguments),) = functions(message)
    assert (fits(name, arguments), finish, call.stop_reason) == (True, "tool_calls", "stop")
    assert not message["content"]
    shown = [{**tool, "function": {k: v for k, v in tool["function"].items() if k != "strict"}} for tool in TOOLS]
    prompt = renderer.render(MESSAGES, shown)
    assert call.prompt_ids[: len(prompt)] == prompt
    assert renderer.decode(call.prompt_ids[len(prompt) :]).startswith('<tool_call>\n{"name": "')
    assert call.constrained
    assert 0 < len(call.forced) < len(call.output_ids)
    assert call.forced[-1] == len(call.output_ids) - 1, "after one call only the end is left"
    # The same ids, whichever way they were sent, and the text of prompt and reply is one call of the template's form.
    whole = renderer.decode([*call.prompt_ids[len(prompt) :], *renderer.without_stop(call.output_ids)])
    assert renderer.parse(whole).tool_calls[0].arguments == json.dumps(arguments, ensure_ascii=False)


async def test_the_next_turn_reads_the_call_as_it_was_sampled(served: Any) -> None:
    served.recorder.open_run("run", "rollout", 7)
    message, _ = await take_turn(served, **ONE_CALL)
    call = {key: message["tool_calls"][0][key] for key in ("id", "type", "function")}
    turns = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call["id"], "content": "done"},
    ]
    await take_turn(served, **{**ONE_CALL, "messages": turns})
    first, second = served.recorder.close_run("run")
    known = first.prompt_ids + first.output_ids
    assert second.prompt_ids[: len(known)] == known
    assert second.history == "extended"


async def test_a_named_call_has_its_name_in_the_prompt(served: Any, renderer: ChatRenderer) -> None:
    message, _, call = await ask(served, tools=TOOLS, tool_choice=NAMED)
    ((name, arguments),) = functions(message)
    assert (name, fits(name, arguments)) == ("rate", True)
    assert renderer.decode(call.prompt_ids).endswith('<tool_call>\n{"name": "rate", "arguments": {"level": ')


async def test_a_request_without_thinking_is_not_held_to_thoughts(serve: Any, sampler: Sampler, tokenizer: Any) -> None:
    opened = (
        "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<think>\n"
        "{% if enable_thinking is defined and not enable_thinking %}</think>\n{% endif %}{% endif %}"
    )
    renderer = ChatRenderer(tokenizer, chat_template=opened, split_thoughts=True)
    served = serve(sampling_client=sampler.client(None, policy_version=3), hints="honour", renderer=renderer)
    options: dict[str, Any] = {"tools": TOOLS, "tool_choice": NAMED}
    off = {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}}
    message, _, call = await ask(served, **options, **off)
    assert [name for name, _ in functions(message)] == ["rate"]
    assert renderer.decode(call.prompt_ids).endswith('<tool_call>\n{"name": "rate", "arguments": {"level": ')
    _, _, call = await ask(served, **options, max_tokens=4)
    assert renderer.decode(call.prompt_ids).endswith("<think>\n")


async def test_parallel_calls_are_whole_calls(served: Any) -> None:
    for seed in range(2):
        message, finish, call = await ask(served, tools=TOOLS, tool_choice="required", seed=seed, max_tokens=80)
        assert all(fits(*function) for function in functions(message))
        assert finish == ("tool_calls" if call.stop_reason == "stop" else "length")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_reply_is_json_of_the_schema(served: Any, stream: bool) -> None:
    message, finish, call = await ask(served, stream=stream, **SCHEMA)
    assert fits("route", json.loads(message["content"]))
    assert (finish, call.constrained) == ("stop", True)
    message, finish, _ = await ask(served, stream=stream, response_format={"type": "json_object"}, max_tokens=64)
    assert message["content"].startswith("{")
    assert finish == "length" or isinstance(json.loads(message["content"]), dict)


async def test_a_free_request_is_free(served: Any) -> None:
    message, _, call = await ask(served, tools=[TOOLS[1]], max_tokens=16)
    assert (call.constrained, call.forced) == (False, [])
    assert message["content"]


async def test_a_schema_that_is_none_is_refused_and_one_that_is_not_followed_in_full_is_named(
    served: Any, caplog: Any
) -> None:
    import openai

    wrong = {"type": "json_schema", "json_schema": {"name": "r", "schema": {"type": "no such type"}}}
    async with served.client() as client:
        with pytest.raises(openai.BadRequestError, match="`response_format`: the form that is asked for cannot be"):
            await client.chat.completions.create(model=MODEL, messages=MESSAGES, response_format=wrong)
    unique = {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 2, "maxItems": 2, "uniqueItems": True}
    for _ in range(2):
        message, _, _ = await ask(
            served, response_format={"type": "json_schema", "json_schema": {"name": "r", "schema": unique}}
        )
        assert len(json.loads(message["content"])) == 2
    said = [record for record in caplog.records if "uniqueItems" in record.getMessage()]
    assert len(said) == 1


def form(**fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest.parse({"model": MODEL, "messages": MESSAGES, **fields})


CALL = '<tool_call>\n{"name": "rate", "arguments": {"level": 7}}\n</tool_call>'
LLAMA_CALL = '{"name": "rate", "parameters": {"level": 7}}'
FORMS: list[tuple[Any, dict[str, Any], list[str], list[str]]] = [
    ("hermes", {"tools": TOOLS}, ["Well.", f"Well.\n{CALL}", f"{CALL}\n{CALL}"], [f"{CALL} x", CALL.replace("7", "x")]),
    ("hermes", {"tools": TOOLS, "parallel_tool_calls": False}, ["Well.", f"Well {CALL}"], [f"{CALL}\n{CALL}"]),
    ("hermes", {"tools": TOOLS, "tool_choice": "required"}, [f"{CALL}\n{CALL}"], ["Well.", f"Well.\n{CALL}"]),
    ("hermes", {"tools": TOOLS, **SCHEMA}, [CALL, '{"team": "café", "urgent": true}'], ["Well.", '{"team": "x"}']),
    ("llama3_json", {"tools": TOOLS}, ["Well.", f"{LLAMA_CALL}; {LLAMA_CALL}"], ["{}", LLAMA_CALL.replace("7", "x")]),
    ("llama3_json", {"tools": TOOLS, **SCHEMA}, [LLAMA_CALL, '{"team": "café", "urgent": true}'], ["Well."]),
]


@pytest.mark.parametrize("thinks", [False, True])
@pytest.mark.parametrize(("tool_format", "fields", "good", "bad"), FORMS)
def test_the_forms_of_the_model_families(
    sampler: Sampler, tokenizer: Any, tool_format: Any, fields: Any, good: Any, bad: Any, thinks: bool
) -> None:
    markers = {text: tokenizer.convert_tokens_to_ids(text) for text in ("<tool_call>", "</tool_call>")}
    forms = ReplyForms(form_named(tool_format), markers.get, thinks=thinks)
    grammar = forms.grammar(form(**fields))
    assert grammar is not None
    assert sampler.grammars is not None
    constraint = sampler.grammars.compile(grammar.text, [tokenizer.eos_token_id])
    asks_for_a_form = "tool_choice" in fields or "response_format" in fields
    thoughts = ["<think>\nhm {\n</think>\n\n"] if thinks and asks_for_a_form else []
    for text, expected in [(text, True) for text in good] + [(text, False) for text in bad]:
        for before in ["", *thoughts]:
            ids = [*tokenizer(before + text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            assert _follows(constraint, ids) == expected, (before, text)


def form_named(name: str) -> ToolForm:
    return next(family() for family in FAMILIES if family.name == name)


def _follows(constraint: Any, ids: list[int]) -> bool:
    if ids[: len(constraint.prefix)] != constraint.prefix:
        return False
    state = constraint.begin()
    for token in ids[len(constraint.prefix) :]:
        if not state.allowed[token]:
            return False
        state.accept(token)
    return bool(state.ended)


def test_a_form_that_cannot_be_asked_for_gives_no_grammar() -> None:
    forms = ReplyForms(None, lambda text: None)
    assert forms.grammar(form(tools=TOOLS, tool_choice="required")) is None
    assert forms.grammar(form()) is None
    assert forms.grammar(form(**SCHEMA)) is not None
