"""Messages to ids and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nat_plugin_evsys.errors import ConfigError, DataError, ModelError
from nat_plugin_evsys.policy.chat import ChatRenderer
from nat_plugin_evsys.policy.history import History
from nat_plugin_evsys.policy.streaming import TokenDecoder

USER = {"role": "user", "content": "What is 2 + 3?"}
QWEN3_STYLE = """{%- for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' and loop.last %}<think>

</think>

{% endif %}{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif %}"""


def test_render_is_the_templates_text(renderer: ChatRenderer, tokenizer: Any) -> None:
    ids = renderer.render([{"role": "developer", "content": [{"type": "text", "text": "Be brief."}]}, USER])
    assert tokenizer.decode(ids) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 2 + 3?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_tools_and_tool_calls_are_shown(renderer: ChatRenderer, add_tool: dict[str, Any]) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 3}'}}
    history = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "5"},
    ]
    text = renderer.decode(renderer.render(history, [add_tool]))
    assert '"description": "Add two numbers."' in text
    assert '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call><|im_end|>' in text
    assert "<tool_response>\n5\n</tool_response>" in text


@pytest.mark.parametrize(
    "arguments", ["{broken", '{"a": "\\ud800"}', '{"a": ' + "[" * 500 + "]" * 500 + "}", "[" * 9999], ids=range(4)
)
def test_arguments_that_cannot_be_written_again_stay_as_the_policy_wrote_them(
    renderer: ChatRenderer, arguments: str
) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": arguments}}
    messages = [USER, {"role": "assistant", "tool_calls": [call]}]
    assert f'"arguments": {arguments}' in renderer.decode(History().prompt(renderer, "", messages, []).ids)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "empty"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "messages[0].content[0]"),
        ([USER, {"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}], "input_audio"),
        ([{"role": "user", "content": 3}], "messages[0].content"),
        ([{"role": "narrator", "content": "x"}], "unknown message role: narrator"),
        ([USER, {"role": "assistant", "content": "", "tool_calls": [{"id": "x"}]}], "function.name"),
        ([USER, {"role": "assistant", "content": "", "reasoning_content": "x"}], "reasoning_content"),
    ],
)
def test_what_cannot_be_rendered_is_refused(renderer: ChatRenderer, messages: list[Any], words: str) -> None:
    with pytest.raises(DataError) as error:
        renderer.render(messages)
    assert words in str(error.value)


@pytest.mark.parametrize(
    "reply",
    [
        {"role": "assistant", "content": "5"},
        {"role": "assistant", "content": "\n\n padded \n"},
        {
            "role": "assistant",
            "content": "Let me add.",
            "tool_calls": [{"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}],
        },
    ],
)
def test_reply_continues_the_generation_prompt_id_for_id(renderer: ChatRenderer, reply: dict[str, Any]) -> None:
    prompt, ids = renderer.render([USER]), renderer.render_reply(reply, [USER])
    assert ids[-1] == renderer.tokenizer.eos_token_id
    whole = renderer.render([USER, reply], add_generation_prompt=False)
    assert renderer.decode([*prompt, *ids]) + "\n" == renderer.decode(whole)
    message = renderer.parse(ids).to_message()
    assert message["content"] == reply["content"]
    assert [c["function"] for c in message.get("tool_calls", [])] == [
        c["function"] for c in reply.get("tool_calls", [])
    ]
    assert renderer.render_reply(message, [USER]) == ids


def test_only_assistant_messages_are_replies(renderer: ChatRenderer) -> None:
    with pytest.raises(DataError, match="assistant"):
        renderer.render_reply(USER)


def test_thinking(tokenizer: Any, add_tool: dict[str, Any]) -> None:
    reply = {"role": "assistant", "content": "5"}
    default = ChatRenderer(tokenizer, chat_template=QWEN3_STYLE)
    assert default.decode(default.render_reply(reply)) == "<think>\n\n</think>\n\n5<|im_end|>"
    off = ChatRenderer(tokenizer, chat_template=QWEN3_STYLE, enable_thinking=False)
    assert off.decode(off.render([USER])).endswith("assistant\n<think>\n\n</think>\n\n")
    assert off.decode(off.render_reply(reply)) == "5<|im_end|>"
    assert off.render([USER], enable_thinking=True) == default.render([USER])
    assert '"name": "add"' in off.decode(off.render([USER], [add_tool]))
    with pytest.raises(ConfigError, match="enable_thinking"):
        ChatRenderer(tokenizer, enable_thinking=False)


def test_a_reply_that_the_template_rewrites_is_refused(tokenizer: Any) -> None:
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}>>{% endif %}"
    )
    renderer = ChatRenderer(tokenizer, chat_template=template)
    with pytest.raises(DataError, match="after its generation prompt"):
        renderer.render_reply({"role": "assistant", "content": "5"})


def test_no_template(tokenizer: Any) -> None:
    import copy

    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(ModelError, match="chat_template"):
        ChatRenderer(bare)


def test_stop_tokens(renderer: ChatRenderer) -> None:
    assert renderer.stop_token_ids == [renderer.tokenizer.eos_token_id]
    end_of_text = renderer.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert renderer.without_stop([40, 41, end_of_text]) == [40, 41]
    assert renderer.without_stop([40, 41]) == [40, 41]


def test_token_bytes_are_the_texts_bytes(renderer: ChatRenderer) -> None:
    text = "Grüße, 世界 🎉 <tool_call>{}</tool_call><|im_end|>"
    ids = renderer.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert b"".join(map(renderer.token_bytes, ids)) == text.encode()


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_incremental_decoding_is_decoding(renderer: ChatRenderer, data: st.DataObject) -> None:
    token = st.integers(0, len(renderer.tokenizer) - 1)
    single_bytes = st.integers(3, 3 + 255)  # the byte alphabet: broken UTF-8 of every kind
    text = st.text(max_size=8).map(lambda s: renderer.tokenizer(s, add_special_tokens=False)["input_ids"])
    ids = [
        i
        for part in data.draw(st.lists(token.map(lambda i: [i]) | single_bytes.map(lambda i: [i]) | text))
        for i in part
    ]
    decoder = TokenDecoder(renderer)
    parts = [decoder.feed([token_id]) for token_id in ids]
    assert "".join(parts) + decoder.finish() == renderer.decode(ids)


def test_broken_characters_are_not_decoded_over_and_over(renderer: ChatRenderer) -> None:
    class Counting:
        ids = 0

        def decode(self, ids: Sequence[int]) -> str:
            self.ids += len(ids)
            return renderer.decode(ids)

    counting: Any = Counting()
    decoder = TokenDecoder(counting)
    broken = [renderer.encode("é")[0]] * 2000
    assert decoder.feed(broken) == ""
    text = decoder.feed(renderer.encode("a"))
    assert text == "\ufffd" * 2000 + "a"
    assert counting.ids < 10 * len(broken)


def test_characters_are_never_cut(renderer: ChatRenderer) -> None:
    text = "Grüße, 世界 🎉🎉 e\u0301"
    decoder = TokenDecoder(renderer)
    parts = [decoder.feed([token_id]) for token_id in renderer.tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert "".join(parts) == text
    assert not any("\ufffd" in part for part in parts)
