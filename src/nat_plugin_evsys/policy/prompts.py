"""From a request to what the policy reads: by the chat template, from the turns before, or as given."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from functools import partial
from typing import Any

from nat_plugin_evsys.errors import DataError
from nat_plugin_evsys.policy.chat import ChatRenderer
from nat_plugin_evsys.policy.history import History, Prompt
from nat_plugin_evsys.policy.open_ended import open_ended_text
from nat_plugin_evsys.policy.rendering.messages import has_images
from nat_plugin_evsys.policy.request import ChatCompletionRequest

PlainPrompt = Callable[[ChatRenderer], tuple[str, list[int]]]
"""Gives the text and the ids of a prompt that has no messages."""


async def prompt_of(
    request: ChatCompletionRequest,
    renderer: ChatRenderer,
    history: History,
    scope: str,
    plain: PlainPrompt | None = None,
) -> Prompt:
    """What the policy reads of a request, before what a grammar may force.

    Args:
        history: the turns that the conversation may go on from.
        scope: of whom they are; see ``History``.
        plain: gives the prompt's text and ids; None renders the messages with the chat template.

    Raises:
        EvsysError: the messages cannot be rendered.
    """
    messages, tools = request.message_dicts(), request.shown_tools
    thinking = request.chat_template_kwargs.enable_thinking if request.chat_template_kwargs else None
    if plain is None and request.opens_turn:
        return await asyncio.to_thread(history.prompt, renderer, scope, messages, tools, enable_thinking=thinking)
    if plain is None and has_images(messages):
        raise DataError("images go with no `continue_final_message`, and with no `add_generation_prompt: false`")
    opened = plain or partial(_open_end, messages, tools, request.continue_final_message, thinking)
    text, ids = await asyncio.to_thread(opened, renderer)
    return Prompt(ids, text, uuid.uuid4().bytes, scope=scope)


def _open_end(
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]],
    continued: bool | None,
    enable_thinking: bool | None,
    renderer: ChatRenderer,
) -> tuple[str, list[int]]:
    text = open_ended_text(renderer, messages, tools, continued=bool(continued), enable_thinking=enable_thinking)
    return text, renderer.encode(text)
