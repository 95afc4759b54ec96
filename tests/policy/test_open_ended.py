"""Prompts that do not open a turn, and how a reply to them is shown: with what it continues, without special tokens."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from nat_plugin_evsys.calls import RUN_ID_HEADER
from nat_plugin_evsys.errors import DataError
from nat_plugin_evsys.policy.chat import ChatRenderer
from nat_plugin_evsys.policy.open_ended import open_ended_text

MODEL = "builtin/tiny"
QUESTION = {"role": "user", "content": "Who goes there?"}
BEGUN = {"role": "assistant", "content": "A friend, "}
CONTINUED: dict[str, Any] = {
    "model": MODEL,
    "messages": [QUESTION, BEGUN],
    "continue_final_message": True,
    "add_generation_prompt": False,
}


async def post(served: Any, body: dict[str, Any], route: str = "chat/completions") -> httpx.Response:
    async with httpx.AsyncClient(headers={**served.auth(), RUN_ID_HEADER: "run"}) as client:
        return await client.post(f"{served.endpoint.base_url}/{route}", json=body)


def streamed_text(response: httpx.Response) -> str:
    chunks = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)


@pytest.mark.parametrize("echo", [False, True])
async def test_the_last_message_is_continued(serve: Any, renderer: ChatRenderer, echo: bool) -> None:
    served = serve(["and a brother."] * 2)
    served.recorder.open_run("run", "rollout", None)
    answer = (await post(served, {**CONTINUED, "echo": echo})).json()
    stream = await post(served, {**CONTINUED, "echo": echo, "stream": True})
    shown = ("A friend, " if echo else "") + "and a brother."
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": shown}
    assert streamed_text(stream) == shown
    for call in served.recorder.close_run("run"):
        text = "<|im_start|>user\nWho goes there?<|im_end|>\n<|im_start|>assistant\nA friend, "
        assert renderer.decode(call.prompt_ids) == text
        assert call.reply["content"] == "and a brother."


async def test_no_turn_is_opened(serve: Any, renderer: ChatRenderer) -> None:
    served = serve(["<|im_start|>user\nMe.", "Me."])
    served.recorder.open_run("run", "rollout", None)
    body = {"model": MODEL, "messages": [QUESTION], "add_generation_prompt": False, "echo": True}
    answers = [(await post(served, body)).json() for _ in range(2)]
    assert answers[1]["choices"][0]["message"]["content"] == "Me."  # the last message is another's, so it is not echoed
    for call in served.recorder.close_run("run"):
        assert renderer.decode(call.prompt_ids) == "<|im_start|>user\nWho goes there?<|im_end|>\n"
    asked = await post(served, CONTINUED, "tokenize")
    assert renderer.decode(asked.json()["tokens"]).endswith("A friend, ")


@pytest.mark.parametrize("stream", [False, True])
async def test_special_tokens_are_shown_unless_they_are_to_be_skipped(serve: Any, stream: bool) -> None:
    said = "one<|im_start|>two"
    served = serve([said] * 3)
    served.recorder.open_run("run", "rollout", None)
    for skip, shown in ((None, said), (False, said), (True, "onetwo")):
        body = {"model": MODEL, "messages": [QUESTION], "skip_special_tokens": skip, "stream": stream}
        response = await post(served, body)
        if stream:
            assert streamed_text(response) == shown
        else:
            assert response.json()["choices"][0]["message"]["content"] == shown
    calls = served.recorder.close_run("run")
    assert len({tuple(call.output_ids) for call in calls}) == 1


async def test_what_cannot_be_continued_is_named(serve: Any, renderer: ChatRenderer) -> None:
    served = serve([])
    for change, words in (
        ({"add_generation_prompt": True}, "goes with `add_generation_prompt: false`"),
        ({"prompt_logprobs": 1, "stream": True}, "goes with no `stream`"),
        ({"messages": [QUESTION, {"role": "assistant", "tool_calls": [call()]}]}, "must be text"),
    ):
        response = await post(served, {**CONTINUED, **change})
        assert response.status_code == 400, response.text
        assert words in response.json()["error"]["message"]
    hiding = "{% for message in messages[:-1] %}{{ message.content }}{% endfor %}<|im_end|>"
    hidden = ChatRenderer(renderer.tokenizer, chat_template=hiding)
    with pytest.raises(DataError, match="that the chat template shows"):
        open_ended_text(hidden, [QUESTION, BEGUN], [], continued=True)


def call() -> dict[str, Any]:
    return {"id": "c", "type": "function", "function": {"name": "add", "arguments": "{}"}}
