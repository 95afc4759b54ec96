"""Images in messages: read from ``data:`` URLs, and put where the chat template writes their mark."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

from nat_plugin_evsys.errors import DataError

if TYPE_CHECKING:
    from tinker import types

_DATA_URL = re.compile(r"data:image/(png|jpeg);base64,", re.IGNORECASE)


class ImageReader(Protocol):
    """What the policy's base model makes of images (``engine.model.vision.Vision``).

    Attributes:
        token: id of the placeholder that stands for each token of an image.
    """

    token: int

    def measure(self, data: bytes, form: str, where: str) -> Any:
        """What has the image's number of ``tokens``. Raises DataError unless it is an image file of that form."""
        ...

    def written(self, tokenizer: Any) -> tuple[str, str]:
        """What a chat template writes for an image, and the text with one placeholder that the model reads there."""
        ...


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image of a message.

    Attributes:
        data: the file.
        form: png or jpeg.
        where: its part of the request, for messages.
    """

    data: bytes
    form: Literal["png", "jpeg"]
    where: str


@dataclass(frozen=True, slots=True)
class PromptImage:
    """An image in a prompt's ids, where it takes ``tokens`` placeholders from ``start`` on."""

    start: int
    tokens: int
    file: ImageFile


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
    return ImageFile(data, cast(Literal["png", "jpeg"], match[1].lower()), f"`{where}`")


def placed(ids: Sequence[int], files: Sequence[ImageFile], reader: ImageReader) -> tuple[list[int], list[PromptImage]]:
    """``ids`` with as many placeholders for each image as it has tokens, and where the images are.

    Args:
        ids: of the rendered conversation, with one placeholder for each image.
        files: in the order of the messages.

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
    images: list[PromptImage] = []
    for each in ids:
        if each != reader.token:
            found.append(each)
            continue
        file = files[len(images)]
        tokens = int(reader.measure(file.data, file.form, file.where).tokens)
        images.append(PromptImage(len(found), tokens, file))
        found += [each] * tokens
    return found, images


def model_input(ids: Sequence[int], images: Sequence[PromptImage]) -> types.ModelInput:
    """Tinker's form of a prompt with images."""
    from tinker import types

    if not images:
        return types.ModelInput.from_ints(list(ids))
    chunks: list[Any] = []
    at = 0
    for image in images:
        chunks.append(types.EncodedTextChunk(tokens=list(ids[at : image.start])))
        chunks.append(types.ImageChunk(data=image.file.data, format=image.file.form, expected_tokens=image.tokens))
        at = image.start + image.tokens
    chunks.append(types.EncodedTextChunk(tokens=list(ids[at:])))
    return types.ModelInput(chunks=[chunk for chunk in chunks if getattr(chunk, "tokens", True)])
