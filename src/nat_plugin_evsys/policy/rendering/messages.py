"""OpenAI-form messages as chat templates want them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from nat_plugin_evsys.errors import DataError
from nat_plugin_evsys.policy.rendering.images import ImageFile, image_of

_DEEPEST = 64
"""Levels of a call's arguments that are read, as many as of a request's own JSON."""


def normalize_messages(
    messages: Sequence[dict[str, Any]], images: list[ImageFile] | None = None
) -> list[dict[str, Any]]:
    """Messages for a chat template; the argument is not changed.

    ``developer`` becomes ``system``, a list of text parts becomes their concatenation, no content becomes "", and a
    tool call's arguments become a dict (see ``arguments_value``).

    Args:
        images: takes the messages' images, whose content stays a list, of ``text`` and ``image`` parts; None refuses
            images.

    Raises:
        DataError: there is no message, or one has a part that cannot be read; the message says which.
    """
    if not messages:
        raise DataError("`messages` is empty; send at least one message")
    return [_normalize(message, f"messages[{index}]", images) for index, message in enumerate(messages)]


def has_images(messages: Sequence[dict[str, Any]]) -> bool:
    """Whether a message has a part of type ``image_url``."""
    return first_image(messages) is not None


def first_image(messages: Sequence[dict[str, Any]]) -> str | None:
    """Where the first part of type ``image_url`` is, for messages; None without one."""
    for index, message in enumerate(messages):
        content = message.get("content")
        for at, part in enumerate(content if isinstance(content, list) else ()):
            if isinstance(part, dict) and part.get("type") == "image_url":
                return f"`messages[{index}].content[{at}]`"
    return None


def _normalize(message: dict[str, Any], where: str, images: list[ImageFile] | None) -> dict[str, Any]:
    role = message.get("role")
    if not isinstance(role, str):
        raise DataError(f"`{where}.role` is {role!r}; it must be system, user, assistant or tool")
    normal = {key: value for key, value in message.items() if value is not None}
    normal["role"] = "system" if role == "developer" else role
    normal["content"] = _content(message.get("content"), where, images)
    if message.get("tool_calls"):
        normal["tool_calls"] = [_normalize_call(call, f"{where}.tool_calls") for call in message["tool_calls"]]
    else:
        normal.pop("tool_calls", None)
    return normal


def _content(content: Any, where: str, images: list[ImageFile] | None) -> Any:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise DataError(
            f"`{where}.content` is of type {type(content).__name__}; it must be text or a list of text parts"
        )
    parts: list[dict[str, str]] = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind == "image_url" and images is not None:
            images.append(image_of(part, f"{where}.content[{index}]"))
            parts.append({"type": "image"})
            continue
        if kind != "text" or not isinstance(part.get("text"), str):
            raise DataError(
                f"`{where}.content[{index}]` is a part of type `{kind}`; only text is read here, "
                "so send parts of type `text`"
            )
        parts.append({"type": "text", "text": part["text"]})
    if any(part["type"] == "image" for part in parts):
        return parts
    return "".join(part["text"] for part in parts)


def _normalize_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"`{where}` has an entry without function.name: {call!r}")
    arguments = function.get("arguments")
    if isinstance(arguments, str) and isinstance(value := arguments_value(arguments), dict):
        arguments = value
    return {**call, "type": "function", "function": {**function, "arguments": {} if arguments is None else arguments}}


def arguments_value(arguments: Any) -> Any:
    """The value of a call's arguments, which clients write as JSON text, each in its own way.

    Text that is no JSON, or of a value that cannot be written again (it has half a character, or is nested deeply),
    stays as it is: the policy wrote it.
    """
    if not isinstance(arguments, str):
        return arguments
    try:
        value = json.loads(arguments or "{}")
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return arguments
    return arguments if _is_deeper(value, _DEEPEST) else value


def _is_deeper(value: Any, levels: int) -> bool:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return items is not None and (levels == 0 or any(_is_deeper(item, levels - 1) for item in items))
