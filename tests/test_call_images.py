"""Images of recorded calls: split from the text around them, named by their hashes, checked, and JSON."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nat_plugin_evsys.call_images import (
    CallImage,
    call_image,
    check_images,
    file_of,
    placed_before,
    referred,
    sha256_of,
    split_at_images,
    with_references,
)
from nat_plugin_evsys.errors import DataError

PLACE = 999


@st.composite
def prompts(draw: st.DrawFn) -> tuple[list[int], list[CallImage], list[Any]]:
    """Ids, images, and the parts that they were made of."""
    parts = draw(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4) | st.binary(min_size=1, max_size=5)))
    ids: list[int] = []
    images: list[CallImage] = []
    for part in parts:
        if isinstance(part, bytes):
            images.append(call_image(len(ids), len(part), part, "png"))
            ids += [PLACE] * len(part)
        else:
            ids += part
    return ids, images, parts


@given(prompts())
def test_the_parts_come_back(prompt: tuple[list[int], list[CallImage], list[Any]]) -> None:
    ids, images, parts = prompt
    check_images(images, ids, "it")
    runs = list(split_at_images(ids, images))
    assert [] not in runs
    assert [
        PLACE if isinstance(run, dict) else token for run in runs for token in (run if isinstance(run, list) else [0])
    ] == [
        PLACE if isinstance(part, bytes) else token
        for part in parts
        for token in (part if isinstance(part, list) else [0])
    ]
    assert [file_of(run) for run in runs if isinstance(run, dict)] == [
        part for part in parts if isinstance(part, bytes)
    ]
    assert json.loads(json.dumps(images)) == images
    assert len(placed_before(images, len(ids))) == len(images)
    assert placed_before(images, 0) == []


def test_messages_name_their_images_by_hash() -> None:
    url = "data:image/png;base64," + base64.b64encode(b"file").decode()
    part = {"type": "image_url", "image_url": {"url": url}}
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "see"}, part]},
        {"role": "assistant", "tool_calls": []},
    ]
    named = with_references(messages, [call_image(3, 2, b"file", "png")])
    assert referred(named[1]["content"][1]) == sha256_of(b"file")
    assert referred(named[1]["content"][0]) is None
    assert referred(part) is None
    assert "content" not in named[2]
    assert messages[1]["content"][1] == part
    assert base64.b64encode(b"file").decode() not in json.dumps(named)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"start": -1}, "takes 2 tokens from -1 on, of a prompt of 6"),
        ({"start": 5}, "takes 2 tokens from 5 on"),
        ({"tokens": 0}, "takes 0 tokens"),
        ({"tokens": True}, "takes True tokens"),
        ({"data": "?"}, "not base64"),
        ({"data": base64.b64encode(b"other").decode()}, "was recorded with"),
        ({"data": None}, "not base64"),
        ({"more": 1}, "is no recorded image"),
    ],
)
def test_what_was_not_recorded_so_is_refused(change: dict[str, Any], says: str) -> None:
    image: Any = call_image(1, 2, b"file", "png")
    check_images([image], range(6), "call 3")
    with pytest.raises(DataError, match=rf"call 3: images\[0\].*{says}"):
        check_images([image | change], range(6), "call 3")
    with pytest.raises(DataError, match=r"images\[1\] takes 2 tokens from 2 on"):
        check_images([image, image | {"start": 2}], range(6), "call 3")
