"""Images in a model's input: each file is checked and measured, and takes a span of placeholder tokens."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from tinker import types

from nat_plugin_evsys.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

MOST_PIXELS = 2**25
"""Of one image, before the model's processor makes it smaller."""

_PILLOW = {"png": "PNG", "jpeg": "JPEG"}
IMAGE_FORMATS = frozenset(_PILLOW)


@dataclass(frozen=True)
class ModelImage:
    """A checked image.

    Attributes:
        data: its file.
        form: png or jpeg.
        key: SHA-256 of the file: what computed features are known by.
        grid: patches that the model's processor cuts it into, (1, height, width); empty where all images have as many.
        tokens: of the model's input.
    """

    data: bytes
    form: str
    key: bytes
    grid: tuple[int, ...]
    tokens: int


@dataclass(frozen=True)
class PlacedImage:
    """An image and the position of its first token."""

    start: int
    image: ModelImage

    @property
    def end(self) -> int:
        """The position after its last token."""
        return self.start + self.image.tokens


class ReadsImages(Protocol):
    """What can say how many tokens an image takes.

    Attributes:
        token: id of the placeholder.
    """

    token: int

    def measure(self, data: bytes, form: str, where: str) -> ModelImage:
        """Raises DataError unless ``data`` is an image file of that form."""
        ...

    def written(self, tokenizer: Any) -> tuple[str, str]:
        """What a chat template writes for an image, and the text with one placeholder that the model reads there."""
        ...


@dataclass(frozen=True)
class NoImages:
    """Stands where a model reads text only, and says why."""

    why: str


def reader_or_reason(vision: ReadsImages | NoImages) -> ReadsImages | str:
    """What reads a model's images, or why nothing does."""
    return vision.why if isinstance(vision, NoImages) else vision


def read_model_input(
    chunks: Iterable[Any], reader: ReadsImages | NoImages, where: str, text_only: str
) -> tuple[list[int], tuple[PlacedImage, ...]]:
    """The token ids of a ModelInput's chunks, with a placeholder for each token of an image, and the images.

    Args:
        where: the input's name in messages.
        text_only: said where ``reader`` takes no images.

    Raises:
        DataError: a chunk is neither text nor an image that the model can read; an image has another number of tokens
            than ``expected_tokens``; two images have no text between them; text has the placeholder's id.
    """
    ids: list[int] = []
    placed: list[PlacedImage] = []
    for chunk in chunks:
        if hasattr(chunk, "tokens"):
            ids.extend(chunk.tokens)
            continue
        kind = type(chunk).__name__
        if isinstance(reader, NoImages):
            raise DataError(f"{where} has a {kind}; {text_only}: {reader.why}")
        if not isinstance(chunk, types.ImageChunk):
            raise DataError(f"{where} has a {kind}; nothing is fetched: send the image's bytes in an ImageChunk")
        image = reader.measure(chunk.data, chunk.format, where)
        if chunk.expected_tokens not in (None, image.tokens):
            raise DataError(
                f"{where} has an image with expected_tokens {chunk.expected_tokens}; this model reads it as "
                f"{image.tokens} tokens"
            )
        if placed and placed[-1].end == len(ids):
            raise DataError(f"{where} has two images with no text token between them; put their markers there")
        placed.append(PlacedImage(len(ids), image))
        ids.extend([reader.token] * image.tokens)
    if not isinstance(reader, NoImages):
        _check_placeholders(ids, placed, reader.token, where)
    return ids, tuple(placed)


def _check_placeholders(ids: list[int], placed: Sequence[PlacedImage], token: int, where: str) -> None:
    if ids.count(token) == sum(each.image.tokens for each in placed):
        return
    spans = {position for each in placed for position in range(each.start, each.end)}
    at = next(i for i, found in enumerate(ids) if found == token and i not in spans)
    raise DataError(f"{where} has token {token} at {at}, which stands for an image; leave it to the ImageChunk")


def images_key(images: Sequence[PlacedImage]) -> bytes:
    """Differs wherever images, or their places, do; empty without images."""
    return b"".join(each.start.to_bytes(8, "big") + each.image.key for each in images)


def content_key(data: bytes) -> bytes:
    """SHA-256 of a file."""
    return hashlib.sha256(data).digest()


def decode(data: bytes, form: str, where: str) -> Image.Image:
    """The picture in RGB, turned as its EXIF data say, as ``transformers.image_utils.load_image`` gives it.

    Raises:
        DataError: the file is not of that form (png or jpeg), is damaged, or has more than ``MOST_PIXELS`` pixels.
    """
    from PIL import Image, ImageOps  # here, because a bare machine that only reads text does without it

    kind = _PILLOW.get(form)
    if kind is None:
        raise DataError(f"{where} has an image of format {form!r}; send png or jpeg")
    try:
        with Image.open(io.BytesIO(data), formats=[kind]) as file:
            if file.width * file.height > MOST_PIXELS:
                raise DataError(
                    f"{where} has an image of {file.width} x {file.height} pixels; at most {MOST_PIXELS} are read: "
                    "make it smaller"
                )
            return ImageOps.exif_transpose(file).convert("RGB")
    except DataError:
        raise
    except Exception as exc:
        # Boundary: Pillow raises many types on damaged files.
        raise DataError(f"{where} has an image that cannot be read as {form}: {exc}") from exc
