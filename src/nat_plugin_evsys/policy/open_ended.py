"""Prompts that do not open a turn: the reply goes on with the last message, or writes what follows it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nat_plugin_evsys.errors import DataError
from nat_plugin_evsys.policy.chat import ChatRenderer
from nat_plugin_evsys.policy.rendering.messages import normalize_messages

_END = "the-end-of-the-last-message"


def open_ended_text(
    renderer: ChatRenderer,
    messages: Sequence[dict[str, Any]],
    tools: Sequence[dict[str, Any]],
    *,
    continued: bool,
    enable_thinking: bool | None = None,
) -> str:
    """The text of a conversation up to its end, or with ``continued`` up to the end of the last message's content.

    Raises:
        DataError: see ``ChatRenderer.render``; the template does not show the end of the message to be continued.
    """
    if not continued:
        return renderer.render_text(messages, tools, add_generation_prompt=False, enable_thinking=enable_thinking)
    last = normalize_messages(messages)[-1]
    marked = [*messages[:-1], {**last, "content": last["content"] + _END}]
    whole = renderer.render_text(marked, tools, add_generation_prompt=False, enable_thinking=enable_thinking)
    text, end, _ = whole.rpartition(_END)
    if not end or last.get("tool_calls"):
        raise DataError("`continue_final_message`: the last message must be text that the chat template shows")
    return text
