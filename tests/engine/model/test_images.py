"""Image files are checked and measured before any compute; what a model cannot read is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from tinker import types
from tiny_vision import (
    END_ID,
    PLACE_ID,
    START_ID,
    VISION_FAMILIES,
    chunk_of,
    file_of,
    image_processor,
    picture,
    text,
    vision_model,
)

from nat_plugin_evsys.engine.model.images import MOST_PIXELS, NoImages, read_model_input
from nat_plugin_evsys.engine.model.loading import BaseModel, load_base_model
from nat_plugin_evsys.engine.model.vision import Vision, find_vision
from nat_plugin_evsys.errors import DataError
from nat_plugin_evsys.runtime.model_check import check_model

SHORT = "only text is read"
POINTER = types.ImageAssetPointerChunk(format="png", location="https://x/y.png", expected_tokens=6)


def read(chunks: list[Any], base: BaseModel) -> Any:
    return read_model_input(chunks, base.vision, "the prompt", SHORT)


def test_an_image_takes_as_many_placeholders_as_its_grid(vision_base_of: Any) -> None:
    base = vision_base_of("qwen2_5_vl")
    ids, images = read([text(5, START_ID), chunk_of(picture(1), expected_tokens=6), text(END_ID)], base)
    assert ids == [5, START_ID, *[PLACE_ID] * 6, END_ID]
    assert [(each.start, each.end, each.image.grid) for each in images] == [(2, 8, (1, 4, 6))]
    again = read([chunk_of(picture(1))], base)[1][0].image
    assert again == images[0].image
    assert read([chunk_of(picture(2))], base)[1][0].image.key != again.key
    assert read([chunk_of(picture(1), "jpeg")], base)[1][0].image.tokens == 6


BAD: list[tuple[str, list[Any], str]] = [
    ("not an image", [types.ImageChunk(data=b"\x89PNG", format="png")], "cannot be read as png"),
    ("another form", [types.ImageChunk(data=file_of(picture(1)), format="jpeg")], "cannot be read as jpeg"),
    ("torn", [types.ImageChunk(data=file_of(picture(1))[:200], format="png")], "cannot be read as png"),
    ("too large", [chunk_of(Image.new("1", (MOST_PIXELS // 1024 + 1, 1024)))], "pixels; at most 33554432"),
    ("miscounted", [chunk_of(picture(1), expected_tokens=7)], "expected_tokens 7; this model reads it as 6 tokens"),
    ("elsewhere", [POINTER], "ImageAssetPointerChunk; nothing is fetched"),
    ("side by side", [chunk_of(picture(1)), chunk_of(picture(2))], "no text token between them"),
    ("placeholder", [chunk_of(picture(1)), text(4, PLACE_ID)], f"token {PLACE_ID} at 7, which stands for an image"),
]


@pytest.mark.parametrize(("chunks", "message"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_what_cannot_be_read_is_refused(vision_base_of: Any, chunks: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=f"the prompt has .*{message}"):
        read(chunks, vision_base_of("qwen2_5_vl"))


def test_a_model_without_images_says_why(base_of: Any, vision_base_of: Any) -> None:
    with pytest.raises(
        DataError, match=f"the prompt has a ImageChunk; {SHORT}: images are offered for .*this is qwen3"
    ):
        read([chunk_of(picture(1))], base_of("qwen3"))
    nothing = find_vision(vision_model("gemma3"), None)
    assert isinstance(nothing, NoImages)
    assert "preprocessor_config.json" in nothing.why
    packed = vision_model("gemma3")
    packed.add_module("one", type("Linear4bit", (torch.nn.Linear,), {"__module__": "bitsandbytes.nn"})(2, 2))
    nothing = find_vision(packed, image_processor("gemma3"))
    assert isinstance(nothing, NoImages)
    assert "layers are packed" in nothing.why


def test_a_directory_is_loaded_with_its_tower(vision_dir: Any, vision_base_of: Any) -> None:
    base = load_base_model(str(vision_dir("qwen3_vl")), device="cpu")
    assert isinstance(base.vision, Vision)
    assert base.identity == vision_base_of("qwen3_vl").identity


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_text_alone_is_as_right_as_in_other_models(vision_base_of: Any, family: str) -> None:
    row = check_model(vision_base_of(family))
    assert row.is_right, row
    assert row.training == "fast"


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_an_image_goes_through_the_processor_once(
    vision_base_of: Any, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = vision_base_of(family)
    processor, seen = base.vision.processor, []

    def counted(**given: Any) -> Any:
        seen.append(given["images"])
        return processor(**given)

    monkeypatch.setattr(base.vision, "processor", counted)
    ids, images = read([text(5), chunk_of(picture(77)), text(6)], base)
    with torch.no_grad():
        first = base.vision.hidden(torch.tensor(ids), images)
        again = base.vision.hidden(torch.tensor(ids), read([text(5), chunk_of(picture(77)), text(6)], base)[1])
    assert torch.equal(first, again)
    assert len(seen) == 1
    other_ids, other = read([text(5), chunk_of(picture(78)), text(6)], base)
    with torch.no_grad():
        assert not torch.equal(first, base.vision.hidden(torch.tensor(other_ids), other))
    assert len(seen) == 2
