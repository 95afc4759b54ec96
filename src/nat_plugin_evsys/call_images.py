"""Images in a recorded call: where they stand among the prompt's ids, and their files. Standard library only.

The messages of a call name each image by its hash (``sha256:…``); the file is kept once.
"""

from __future__ import annotations

import base64
import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypedDict

from nat_plugin_evsys.errors import DataError

ImageFormat = Literal["png", "jpeg"]

IMAGES_DIRECTORY = "images"

_REFERENCE = "sha256:"


class CallImage(TypedDict):
    """An image in a prompt. JSON-ready.

    Attributes:
        start: position of its first placeholder in ``prompt_ids``.
        tokens: how many placeholders it takes.
        sha256: of its file, in hex; images with equal hashes are the same image.
        format: of its file.
        data: its file, in base64.
    """

    start: int
    tokens: int
    sha256: str
    format: ImageFormat
    data: str


def call_image(start: int, tokens: int, data: bytes, form: ImageFormat) -> CallImage:
    """The image of a file, which takes ``tokens`` placeholders from ``start`` on."""
    # Interned: the calls of all attempts at a row show the same few images.
    text = sys.intern(base64.b64encode(data).decode("ascii"))
    return CallImage(start=start, tokens=tokens, sha256=sha256_of(data), format=form, data=text)


def file_of(image: CallImage) -> bytes:
    """The image's file."""
    return base64.b64decode(image["data"])


def image_path(image: CallImage) -> str:
    """Where the file is kept, relative to the rollouts that show it."""
    return f"{IMAGES_DIRECTORY}/{image['sha256']}.{image['format']}"


def sha256_of(data: bytes) -> str:
    """The hash by which an image's file is known, in hex."""
    return hashlib.sha256(data).hexdigest()


def placed_before(images: Sequence[CallImage], end: int) -> list[tuple[int, str]]:
    """Which images start before position ``end``, and where: equal for prompts that show the same ones until there."""
    return [(image["start"], image["sha256"]) for image in images if image["start"] < end]


def split_at_images(ids: Sequence[int], images: Sequence[CallImage]) -> Iterator[list[int] | CallImage]:
    """``ids`` as runs of text, none of them empty, and the images between them."""
    at = 0
    for image in images:
        if image["start"] > at:
            yield list(ids[at : image["start"]])
        yield image
        at = image["start"] + image["tokens"]
    if at < len(ids):
        yield list(ids[at:])


def with_references(messages: Sequence[dict[str, Any]], images: Sequence[CallImage]) -> list[dict[str, Any]]:
    """The messages with ``sha256:…`` as the URL of each ``image_url`` part; ``images`` are theirs, in order."""
    left = iter(images)

    def shown(content: Any) -> Any:
        if not isinstance(content, list):
            return content
        return [_referring(part, next(left)) if _is_image(part) else part for part in content]

    if not images:
        return list(messages)
    return [
        {**message, "content": shown(message["content"])} if "content" in message else message for message in messages
    ]


def referred(part: Any) -> str | None:
    """The hash of the image that a part of a recorded message stands for; None for any other part."""
    given = part.get("image_url") if isinstance(part, Mapping) and _is_image(part) else None
    url = given.get("url") if isinstance(given, Mapping) else None
    return url.removeprefix(_REFERENCE) if isinstance(url, str) and url.startswith(_REFERENCE) else None


def check_images(images: Any, prompt_ids: Sequence[int], name: str) -> None:
    """Raises DataError unless these are images of a prompt, in order and apart, whose files have their hashes.

    Args:
        name: the call's, for messages.
    """
    at = 0
    for number, image in enumerate(images):
        where = f"{name}: images[{number}]"
        if not isinstance(image, Mapping) or set(image) != set(CallImage.__annotations__):
            raise DataError(f"{where} is no recorded image; it must have {', '.join(CallImage.__annotations__)}")
        start, tokens = image["start"], image["tokens"]
        if type(start) is not int or type(tokens) is not int or not (at <= start < start + tokens <= len(prompt_ids)):
            raise DataError(f"{where} takes {tokens!r} tokens from {start!r} on, of a prompt of {len(prompt_ids)}")
        at = start + tokens
        try:
            found = sha256_of(base64.b64decode(image["data"], validate=True))
        except (TypeError, ValueError) as error:
            raise DataError(f"{where}: its data are not base64: {error}") from error
        if found != image["sha256"]:
            raise DataError(f"{where}: its file has SHA-256 {found}, and it was recorded with {image['sha256']}")


def _is_image(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "image_url"


def _referring(part: Mapping[str, Any], image: CallImage) -> dict[str, Any]:
    return {**part, "image_url": {"url": _REFERENCE + image["sha256"]}}
