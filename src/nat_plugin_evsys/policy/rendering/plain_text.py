"""Control tokens that stand in a message's text: written as text, so that no message can end its own turn.

Where a message has the text of a special token, such as ``<|im_end|>``, a noncharacter is put into it before the
template renders the messages, and taken out again when the text between the template's own control tokens is encoded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeVar

from nat_plugin_evsys.errors import DataError

T = TypeVar("T")

MARK = "\ufdd0"
"""Unicode keeps it for use within a program; no text has it."""


def unmarked(text: str) -> str:
    """The text without marks."""
    return text.replace(MARK, "")


class PlainText:
    """Marks the special tokens in texts, and encodes what a template made of them.

    Args:
        tokenizer: a fast tokenizer of transformers.
        special: its special tokens and their ids.
    """

    def __init__(self, tokenizer: Any, special: Mapping[str, int]) -> None:
        self._tokenizer = tokenizer
        self._ids = frozenset(special.values())
        texts = sorted((text for text in special if len(text) > 1), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, texts))) if texts else None

    def marked(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Messages (or tools) in which no text has a special token.

        Raises:
            DataError: a text has the mark itself.
        """
        return [self._mark(message) for message in messages]

    def encode(self, text: str) -> list[int]:
        """The ids of rendered text that has marks.

        Raises:
            DataError: the tokenizer cannot write a special token as text.
        """
        ids: list[int] = []
        is_text = True
        for piece in self._pieces(text):
            marked = MARK in piece
            encoded = self._tokenizer(unmarked(piece), add_special_tokens=False, split_special_tokens=marked)
            is_text &= not marked or self._ids.isdisjoint(encoded["input_ids"])
            ids += encoded["input_ids"]
        decoded = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if not is_text or decoded != unmarked(text):
            raise DataError(
                "`messages` have the text of a control token, which this model's tokenizer cannot write as text; "
                "remove it, or set `special_tokens: control` of the policy"
            )
        return ids

    def _pieces(self, text: str) -> list[str]:
        """The text cut behind the template's own special tokens, which no token reaches across."""
        assert self._special is not None
        ends = [0, *(match.end() for match in self._special.finditer(text)), len(text)]
        pieces = [text[start:end] for start, end in pairwise(ends) if end > start]
        cut: list[str] = []
        for piece in pieces:
            match = self._special.search(piece) if MARK in piece else None
            cut += [piece] if match is None else [piece[: match.start()], piece[match.start() :]]
        return [piece for piece in cut if piece]

    def _mark(self, value: T) -> T:
        if isinstance(value, str):
            if MARK in value:
                raise DataError("it has the noncharacter U+FDD0, which is no text; remove it")
            if self._special is None:
                return value
            return self._special.sub(lambda match: match[0][0] + MARK + match[0][1:], value)  # type: ignore[return-value]
        if isinstance(value, dict):
            return {self._mark(key): self._mark(item) for key, item in value.items()}  # type: ignore[return-value]
        if isinstance(value, list):
            return [self._mark(item) for item in value]  # type: ignore[return-value]
        return value
