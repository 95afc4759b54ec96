"""Images in messages: read from ``data:`` URLs, and put where the chat template writes their mark."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from nat_plugin_evsys.call_images import CallImage, ImageFormat, call_image, file_of, split_at_images
from nat_plugin_evsys.errors import DataError

if TYPE_CHECKING:
    from tinker import types

    from nat_plugin_evsys.backends.base import ReadsImages

_DATA_URL = re.compile(r"data:image/(png|jpeg);base64,", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image of a message.

    Attributes:
        data: the file.
        form: png or jpeg.
        where: its part of the request, for messages.
    """

    data: bytes
    form: ImageFormat
    where: str


def image_of(part: dict[str, Any], where: str) -> ImageFile:
    """The image of a part of type ``image_url``.

    Raises:
        DataError: its URL is not a ``data:`` URL of a PNG or JPEG file in base64; it asks for a ``detail``.
    """
    given = part.get("image_url")
    url = given.get("url") if isinstance(given, dict) else given
    if isinstance(given, dict) and given.get("detail") not in (None, "auto"):
        raise DataError(
            f"`{where}.image_url.detail` is not offered: the model's processor chooses the size; leave it out"
        )
    match = _DATA_URL.match(url) if isinstance(url, str) else None
    if match is None or not isinstance(url, str):
        raise DataError(
            f"`{where}.image_url.url` must be data:image/png;base64,… or data:image/jpeg;base64,…; nothing is fetched"
        )
    try:
        data = base64.b64decode(url[match.end() :], validate=True)
    except ValueError as error:
        raise DataError(f"`{where}.image_url.url` is not base64: {error}") from error
    return ImageFile(data, cast(ImageFormat, match[1].lower()), f"`{where}`")


def placed(
    ids: Sequence[int], files: Sequence[ImageFile], reader: ReadsImages, start: int = 0
) -> tuple[list[int], list[CallImage]]:
    """``ids`` with as many placeholders for each image as it has tokens, and where the images are.

    Args:
        ids: of the rendered conversation, with one placeholder for each image.
        files: in the order of the messages.
        start: how many ids of the prompt come before these.

    Raises:
        DataError: there are more or fewer placeholders than images, or a file is no such image.
    """
    marks = sum(each == reader.token for each in ids)
    if marks != len(files):
        raise DataError(
            f"the model's chat template has written {marks} places for {len(files)} images; set a `chat_template` that "
            "shows images"
        )
    found: list[int] = []
    images: list[CallImage] = []
    for each in ids:
        if each != reader.token:
            found.append(each)
            continue
        file = files[len(images)]
        tokens = reader.measure(file.data, file.form, file.where).tokens
        images.append(call_image(start + len(found), tokens, file.data, file.form))
        found += [each] * tokens
    return found, images


def model_input(ids: Sequence[int], images: Sequence[CallImage]) -> types.ModelInput:
    """Tinker's form of a prompt."""
    from tinker import types

    return types.ModelInput(
        chunks=[
            types.EncodedTextChunk(tokens=run)
            if isinstance(run, list)
            else types.ImageChunk(data=file_of(run), format=run["format"], expected_tokens=run["tokens"])
            for run in split_at_images(ids, images)
        ]
    )
