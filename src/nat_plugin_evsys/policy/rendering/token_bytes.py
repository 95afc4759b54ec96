"""The bytes that tokens stand for, which need not be whole characters."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from typing import Any

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


class TokenBytes:
    """The UTF-8 bytes of a tokenizer's tokens.

    Args:
        control_ids: tokens that stand for their own name.
        decode: the text of a token that is neither of bytes nor a control token.
    """

    def __init__(self, tokenizer: Any, control_ids: Collection[int], decode: Callable[[list[int]], str]) -> None:
        self._tokenizer = tokenizer
        self._control_ids = control_ids
        self._decode = decode
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._known: dict[int, bytes] = {}
        self._is_byte_level = backend is not None and "ByteLevel" in repr(backend.decoder)

    def of(self, token_id: int) -> bytes:
        """The bytes of one token; none if there is no such token."""
        found = self._known.get(token_id)
        if found is None:
            found = self._known[token_id] = self._read(token_id)
        return found

    def _read(self, token_id: int) -> bytes:
        piece: str | None = self._tokenizer.convert_ids_to_tokens(token_id)
        if piece is None:
            return b""
        if token_id in self._control_ids:
            return piece.encode()
        if match := _BYTE_PIECE.fullmatch(piece):
            return bytes([int(match[1], 16)])
        if self._is_byte_level and all(char in _BYTE_OF for char in piece):
            return bytes(_BYTE_OF[char] for char in piece)
        return self._decode([token_id]).encode()


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in of each byte (``bytes_to_unicode``), turned round."""
    printable: Iterable[int] = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    return table | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_level_alphabet()
