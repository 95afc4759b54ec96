"""What a file of NAT's exporters says of one workflow run, in one form for all of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nat_plugin_evsys.calls import DropReason
from nat_plugin_evsys.rollouts.episodes import Message, text_of

_IMAGES = ("image", "image_url", "input_image")


@dataclass(frozen=True, slots=True)
class TracedCall:
    """One LLM call.

    Attributes:
        messages, tools, reply: in OpenAI form.
        logprobs: OpenAI's entries, or numbers; empty where none were recorded.
        token_ids: those of the reply, or None.
        model: the name by which the call asked for its model; "" if unknown.
        prompt_tokens, reply_tokens: how many the model counted, or None.
        functions: names of NAT's functions in which it was made.
        without_system: whether ``messages`` may lack the system prompt, which NAT's ATIF leaves out.
    """

    messages: list[Message]
    reply: Message
    tools: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    token_ids: list[int] | None = None
    model: str = ""
    prompt_tokens: int | None = None
    reply_tokens: int | None = None
    functions: tuple[str, ...] = ()
    without_system: bool = False


@dataclass(slots=True)
class Record:
    """One workflow run.

    Attributes:
        name: where it stands, for messages.
        question, output: what went into the workflow, and what came out.
        expected: the answer it should have given; None where the record does not say.
        entry: the record itself, for the feedback in it.
        steps: NAT's intermediate steps as JSON, for evaluators that read them.
        problem: why it cannot be trained on, or None.
        error: what was seen of the problem, or None.
    """

    name: str
    question: Any = None
    output: Any = None
    expected: Any = None
    calls: list[TracedCall] = field(default_factory=list)
    entry: dict[str, Any] = field(default_factory=dict)
    steps: list[dict[str, Any]] = field(default_factory=list)
    problem: DropReason | None = None
    error: str | None = None


def content_of(content: Any) -> Any:
    """The text of a recorded content; one with images stays as it is, and is refused where messages are rendered."""
    parts = content if isinstance(content, list) else ()
    has_image = any(isinstance(part, Mapping) and part.get("type") in _IMAGES for part in parts)
    return content if has_image else text_of(content)


def at_path(entry: Mapping[str, Any], path: str) -> Any:
    """The value below keys that are joined by dots; None where one is missing."""
    value: Any = entry
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def question_key(question: Any) -> str:
    """What a question is known by: its text, or as JSON."""
    return question if isinstance(question, str) else json.dumps(question, sort_keys=True, default=str)
