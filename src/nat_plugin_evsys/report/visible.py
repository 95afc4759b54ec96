"""Text of models and clients for a terminal, which no control character of it can repaint."""

from __future__ import annotations

_VISIBLE = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"} | {127: "␡"}
_VISIBLE |= {code: "�" for code in range(128, 160)}


def visible(text: str) -> str:
    """``text`` with every control character except newline and tab replaced by a visible symbol."""
    return text.translate(_VISIBLE)
