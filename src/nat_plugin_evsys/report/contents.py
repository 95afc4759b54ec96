"""Contents of messages in ATIF: text, or parts of text and images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nat.atif import ContentPart


def content_text(content: str | Sequence[ContentPart] | None) -> str:
    """What a content says, with the path of its file for an image."""
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text or "" if part.source is None else f"[image {part.source.path}]" for part in content)
