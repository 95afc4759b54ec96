"""What the policy said stays what it said: a conversation's next prompt starts with the ids of its turn before."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nat_plugin_evsys.calls import RUN_ID_HEADER, Call, PromptHistory
from nat_plugin_evsys.errors import DataError
from nat_plugin_evsys.policy.chat import ChatRenderer
from nat_plugin_evsys.policy.history import History, Turn, turn_of

MODEL = "builtin/tiny"
ASKED: list[Any] = [{"role": "user", "content": "What is 2 + 3?"}]
NEXT: dict[str, Any] = {"role": "user", "content": "And now?"}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last and '</think>' in m.content %}"
    "{{ m.content.split('</think>')[-1].lstrip() }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""It drops the thoughts of earlier turns, as Qwen 3's does."""


def letters(renderer: ChatRenderer, text: str, *, end: bool = True) -> list[int]:
    """A text that was sampled character by character, as no tokenizer would write it."""
    ids = [token for char in text for token in renderer.encode(char)]
    assert ids != renderer.encode(text)
    return [*ids, *([renderer.end_of_turn] if end else [])]  # type: ignore[list-item]


async def two_turns(served: Any, **request: Any) -> list[Call]:
    """The calls of ``converse``, once the run is closed."""
    await converse(served, **request)
    calls: list[Call] = served.recorder.close_run("run")
    return calls


async def converse(served: Any, *, edit: Any = lambda reply: reply, **request: Any) -> list[Any]:
    """Open a run, ask, send the reply back with a further message, ask again; the messages of the second call."""
    served.recorder.open_run("run", "rollout", None)
    headers = {RUN_ID_HEADER: "run"}
    async with served.client() as client:
        first = await client.chat.completions.create(model=MODEL, messages=ASKED, extra_headers=headers, **request)
        reply = edit(first.choices[0].message.model_dump(exclude_none=True))
        results = [
            {"role": "tool", "tool_call_id": call["id"], "content": "5"} for call in reply.get("tool_calls") or []
        ]
        history = [*ASKED, reply, *(results or [NEXT])]
        await client.chat.completions.create(model=MODEL, messages=history, extra_headers=headers, **request)
    return history


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "text"]), inner),
    max_leaves=6,
)


@given(content=JSON)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_content_is_rendered_or_refused_by_name(renderer: ChatRenderer, content: Any) -> None:
    refusal = None
    try:
        assert History().prompt(renderer, "", [{"role": "user", "content": content}, NEXT], []).ids
    except DataError as error:
        refusal = str(error)
    assert refusal is None or "messages[0]" in refusal


REPLIES = {
    "free text": "The sum is  5 .",
    "white space at its ends": " \n5\n\n",
    "one call": '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call>',
    "compact call": '<tool_call>{"name":"add","arguments":{"b":3,"a":2}}</tool_call>',
    "text, two calls, white space": 'Let me see.\n\n<tool_call>{"name": "add", "arguments": {}}</tool_call>\n\n'
    '<tool_call>\n{"arguments": {"a": "\\u00e9"}, "name": "add"}</tool_call> \n',
    "a broken call": '<tool_call>{"name": "add", </tool_call>',
}


@pytest.mark.parametrize("case", REPLIES)
async def test_the_next_prompt_starts_with_what_was_read_and_sampled(
    serve: Any, renderer: ChatRenderer, add_tool: Any, case: str
) -> None:
    served = serve([letters(renderer, REPLIES[case]), "Done."])
    one, two = await two_turns(served, tools=[add_tool], max_tokens=400)
    known = one.prompt_ids + one.output_ids
    assert two.prompt_ids[: len(known)] == known
    added = renderer.decode(two.prompt_ids[len(known) :])
    assert added.startswith("\n<|im_start|>user\n")
    assert added.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert ("tool_response" in added) == ("tool_calls" in one.reply)
    assert (one.history, two.history) == (PromptHistory.NEW, PromptHistory.EXTENDED)


async def test_tokenize_gives_the_ids_of_a_conversation_that_goes_on(serve: Any, renderer: ChatRenderer) -> None:
    """NeMo Gym takes a call's prompt from it, at vLLM's place."""
    served = serve([letters(renderer, "The sum is 5."), "Done."])
    messages = await converse(served)
    async with httpx.AsyncClient(headers=served.auth() | {RUN_ID_HEADER: "run"}) as client:
        url = f"{served.endpoint.base_url.removesuffix('/v1')}/tokenize"
        answer = await client.post(url, json={"model": MODEL, "messages": messages})
    _, two = served.recorder.close_run("run")
    assert answer.json()["tokens"] == two.prompt_ids != renderer.render(two.messages)


@pytest.mark.parametrize(
    ("sampled", "request_options", "kept"),
    [
        ("I think.\nObservation: 5", {"stop": ["Observation:"]}, "I think.\n"),
        ("I think of a long sum.", {"max_tokens": 7}, "I think"),
    ],
)
async def test_replies_that_were_cut(
    serve: Any, renderer: ChatRenderer, sampled: str, request_options: Any, kept: str
) -> None:
    served = serve([letters(renderer, sampled), "Done."])
    one, two = await two_turns(served, **request_options)
    known = one.prompt_ids + letters(renderer, kept, end=False)
    assert two.prompt_ids[: len(known)] == known
    assert renderer.decode(two.prompt_ids[len(known) :]).startswith("<|im_end|>\n<|im_start|>user\nAnd now?")
    assert two.history == PromptHistory.EXTENDED


def test_a_token_that_a_stop_string_cuts_is_written_again(renderer: ChatRenderer) -> None:
    history = History()
    prompt = history.prompt(renderer, "", ASKED, [])
    ids = renderer.encode("The answer")
    assert len(ids) > 1
    seen = "The answer"[:-2]
    history.add(prompt, turn_of(renderer, prompt, ids, len(ids), seen, {"role": "assistant", "content": seen}))
    messages = [*ASKED, {"role": "assistant", "content": seen}, NEXT]
    again = history.prompt(renderer, "", messages, [])
    assert again.history == PromptHistory.EXTENDED
    assert renderer.decode(again.ids) == again.text == renderer.render_text(messages)


async def test_another_reply_than_the_policys_is_rendered(serve: Any, renderer: ChatRenderer) -> None:
    served = serve([letters(renderer, "The sum is 5."), "Done."])
    _, two = await two_turns(served, edit=lambda reply: {**reply, "content": "The sum is 6."})
    assert two.history == PromptHistory.CHANGED
    assert two.prompt_ids == renderer.render(two.messages)


@pytest.mark.parametrize(("content", "expected"), [("<think>2 + 3</think>5", "rewritten"), ("5 or six", "extended")])
async def test_a_template_that_rewrites_a_turn_has_its_way(
    serve: Any, tokenizer: Any, content: str, expected: str
) -> None:
    renderer = ChatRenderer(tokenizer, chat_template=CHATML)
    served = serve([letters(renderer, content), "Done."], renderer=renderer)
    _, two = await two_turns(served)
    assert two.history == expected
    assert "think" not in renderer.decode(two.prompt_ids)
    assert (two.prompt_ids == renderer.render(two.messages)) == (expected == "rewritten")


def test_rollouts_that_say_the_same_in_other_tokens_are_kept_apart(renderer: ChatRenderer) -> None:
    history, reply = History(), {"role": "assistant", "content": "The sum is 5."}
    prompt = {scope: history.prompt(renderer, scope, ASKED, []) for scope in "ab"}
    sampled = {"a": letters(renderer, "The sum is 5."), "b": [*renderer.encode("The sum is 5."), renderer.end_of_turn]}
    for scope, ids in sampled.items():
        history.add(prompt[scope], turn_of(renderer, prompt[scope], ids, len(ids) - 1, "The sum is 5.", reply))
    for scope, ids in sampled.items():
        again = history.prompt(renderer, scope, [*ASKED, reply, NEXT], [])
        assert again.ids[: len(prompt[scope].ids) + len(ids)] == prompt[scope].ids + ids
    assert history.prompt(renderer, "c", [*ASKED, reply, NEXT], []).history == PromptHistory.NEW


async def test_the_turns_of_a_closed_rollout_are_forgotten(serve: Any) -> None:
    """Run after run, nothing of those that ended is kept, and those that are open lose nothing."""
    served = serve(["The sum is 5."] * 11)
    served.recorder.open_run("open", "rollout", None)
    headers = {RUN_ID_HEADER: "open"}
    async with served.client() as client:
        await client.chat.completions.create(model=MODEL, messages=ASKED, extra_headers=headers)
        for _ in range(3):
            one, two = await two_turns(served)
            assert (one.history, two.history) == (PromptHistory.NEW, PromptHistory.EXTENDED)
            reply = {"role": "assistant", "content": "The sum is 5."}
            served.recorder.open_run("run", "rollout", None)
            again = {"messages": [*ASKED, reply, NEXT], "extra_headers": {RUN_ID_HEADER: "run"}}
            await client.chat.completions.create(model=MODEL, **again)
            (third,) = served.recorder.close_run("run")
            assert third.history == PromptHistory.NEW
        await client.chat.completions.create(model=MODEL, messages=[*ASKED, reply, NEXT], extra_headers=headers)
    assert served.recorder.close_run("open")[-1].history == PromptHistory.EXTENDED


def test_a_forgotten_scope_leaves_nothing(renderer: ChatRenderer) -> None:
    history = History()
    for scope in "aab":
        prompt = history.prompt(renderer, scope, ASKED, [])
        history.add(prompt, turn_of(renderer, prompt, [1], 1, "x", {"role": "assistant", "content": "x"}))
    history.forget("a")
    assert len(history._turns) == len(history._asked) == 1
    history.forget("b")
    assert (len(history._turns), len(history._asked), history._bytes) == (0, 0, 0)


def test_old_turns_are_forgotten(renderer: ChatRenderer) -> None:
    history = History(max_bytes=64 << 10)
    for number in range(200):
        prompt = history.prompt(renderer, "", [{"role": "user", "content": f"{number}"}], [])
        history.add(prompt, turn_of(renderer, prompt, [1], 1, "x", {"role": "assistant", "content": "x"}))
    held: list[Turn] = list(history._turns.values())
    assert 0 < sum(turn.size for turn in held) <= 64 << 10
    assert len(history._asked) <= len(held) + 1
    newest = [{"role": "user", "content": "199"}, {"role": "assistant", "content": "x"}, NEXT]
    assert history.prompt(renderer, "", newest, []).history == PromptHistory.EXTENDED


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_reply_comes_back_as_it_was_sampled(renderer: ChatRenderer, data: st.DataObject) -> None:
    """Any ids at all: the next prompt starts with them, or is what the template writes."""
    vocabulary = st.integers(0, len(renderer.tokenizer) - 1)
    ids = data.draw(st.lists(vocabulary, max_size=20))
    history, tools = History(), [{"type": "function", "function": {"name": "add"}}]
    prompt = history.prompt(renderer, "", ASKED, tools)
    text = renderer.decode(ids)
    reply = json.loads(json.dumps(renderer.parse(text).to_message()))
    history.add(prompt, turn_of(renderer, prompt, ids, len(ids), text, reply))
    messages = [*ASKED, reply, NEXT]
    again = history.prompt(renderer, "", messages, tools)
    known = [*prompt.ids, *ids]
    if again.history == PromptHistory.EXTENDED:
        assert again.ids[: len(known)] == known
        assert renderer.decode(again.ids).endswith("And now?<|im_end|>\n<|im_start|>assistant\n")
    else:
        assert renderer.end_of_turn in ids
        assert again.ids == renderer.render(messages, tools)
