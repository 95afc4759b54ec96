"""Conversations with images: the next prompt starts with the ids, and the images, of the turn before."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from tiny_vision import PLACE_ID, TURN_ID, chat_template, file_of, image_part, picture, vision_base

from nat_plugin_evsys.call_images import file_of as file_in
from nat_plugin_evsys.call_images import placed_before, sha256_of
from nat_plugin_evsys.calls import PromptHistory
from nat_plugin_evsys.engine.model.vision import Vision
from nat_plugin_evsys.errors import DataError
from nat_plugin_evsys.policy.chat import ChatRenderer
from nat_plugin_evsys.policy.history import History, Prompt, turn_of
from nat_plugin_evsys.policy.rendering.images import model_input

FAMILIES = ("qwen2_5_vl", "gemma3")
REPLY = [70, 71, 72, TURN_ID]
"""Sampled token by token, as the tokenizer would not write it."""


@cache
def renderer_of(family: str) -> ChatRenderer:
    base = vision_base(family)
    assert isinstance(base.vision, Vision)
    return ChatRenderer(base.tokenizer, chat_template=chat_template(family), images=base.vision)


def asked(*parts: Any) -> dict[str, Any]:
    return {
        "role": "user",
        "content": [{"type": "text", "text": part} if isinstance(part, str) else image_part(part) for part in parts],
    }


def answer(renderer: ChatRenderer, history: History, prompt: Prompt) -> dict[str, Any]:
    text = renderer.decode(REPLY[:-1])
    reply = {"role": "assistant", "content": text}
    history.add(prompt, turn_of(renderer, prompt, REPLY, 3, text, reply))
    return reply


@pytest.mark.parametrize("family", FAMILIES)
def test_the_second_turn_extends_the_first_across_its_images(family: str) -> None:
    renderer, history = renderer_of(family), History()
    first = [asked("See ", picture(1), " and ", picture(2, 40, 30), ".")]
    prompt = history.prompt(renderer, "", first, [])
    reply = answer(renderer, history, prompt)
    messages = [*first, reply, asked("And ", picture(3), "?")]
    again = history.prompt(renderer, "", messages, [])
    assert again.history is PromptHistory.EXTENDED
    known = [*prompt.ids, *REPLY]
    assert again.ids[: len(known)] == known
    assert placed_before(again.images, len(prompt.ids)) == placed_before(prompt.images, len(prompt.ids))
    shown = [picture(1), picture(2, 40, 30), picture(3)]
    assert [file_in(image) for image in again.images] == [file_of(each) for each in shown]
    # Every placeholder belongs to an image, and an image's span has nothing else.
    spans = [i for image in again.images for i in range(image["start"], image["start"] + image["tokens"])]
    assert spans == [i for i, token in enumerate(again.ids) if token == PLACE_ID]
    # As rendered anew, where the tokenizer writes the reply as it was sampled.
    anew = History().prompt(renderer, "", messages, [])
    assert (anew.ids, anew.images) == (again.ids, again.images)
    assert anew.history is PromptHistory.NEW
    given = model_input(again.ids, again.images)
    assert given.length == len(again.ids)
    assert [type(chunk).__name__ for chunk in given.chunks] == ["EncodedTextChunk", "ImageChunk"] * 3 + [
        "EncodedTextChunk"
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_another_image_in_the_same_words_follows_no_turn(family: str) -> None:
    renderer, history = renderer_of(family), History()
    prompt = history.prompt(renderer, "", [asked("See ", picture(1))], [])
    reply = answer(renderer, history, prompt)
    other = history.prompt(renderer, "", [asked("See ", picture(2)), reply, asked("And?")], [])
    assert other.history is PromptHistory.NEW
    assert [image["sha256"] for image in other.images] == [sha256_of(file_of(picture(2)))]
    # A later image does not change which turn a conversation follows.
    third = history.prompt(renderer, "", [asked("See ", picture(1)), reply, asked("And ", picture(2), "?")], [])
    assert third.history is PromptHistory.EXTENDED


def test_a_policy_that_reads_text_only_says_why() -> None:
    base = vision_base("qwen2_5_vl")
    renderer = ChatRenderer(base.tokenizer, chat_template=chat_template("qwen2_5_vl"), images="replicas read text")
    with pytest.raises(DataError, match=r"`messages\[1\].content\[1\]` is an image, .*: replicas read text"):
        History().prompt(renderer, "", [{"role": "system", "content": "s"}, asked("See ", picture(1))], [])


def test_a_template_that_shows_no_images_is_named() -> None:
    base = vision_base("qwen2_5_vl")
    assert isinstance(base.vision, Vision)
    template = "{% for m in messages %}{{ m.role }}{% endfor %}"
    renderer = ChatRenderer(base.tokenizer, chat_template=template, images=base.vision)
    with pytest.raises(DataError, match="has written 0 places for 1 images"):
        History().prompt(renderer, "", [asked("See ", picture(1))], [])


def test_what_is_kept_of_images_counts() -> None:
    renderer = renderer_of("qwen2_5_vl")
    image = picture(1, 32, 32)
    history = History(max_bytes=3 * len(file_of(image)))
    for number in range(4):
        prompt = history.prompt(renderer, "", [asked(f"{number}", image)], [])
        answer(renderer, history, prompt)
    reply = {"role": "assistant", "content": renderer.decode(REPLY[:-1])}
    first, last = (history.prompt(renderer, "", [asked(f"{n}", image), reply, asked("?")], []) for n in (0, 3))
    assert first.history is not PromptHistory.EXTENDED
    assert last.history is PromptHistory.EXTENDED
