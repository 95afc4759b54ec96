"""What parsers share that read a reply marker by marker."""

from __future__ import annotations

from abc import ABC, abstractmethod

from nat_plugin_evsys.policy.tool_calls import Piece


class SteppingParser(ABC):
    """Keeps the text that is not decided yet, and steps over it as far as it goes.

    Attributes:
        malformed: see ``ReplyParser``.
    """

    def __init__(self) -> None:
        self.malformed = 0
        self._text = ""

    def feed(self, text: str) -> list[Piece]:
        """What is certain after ``text``."""
        return self._advance(text, final=False)

    def _advance(self, text: str, *, final: bool) -> list[Piece]:
        self._text += text
        pieces: list[Piece] = []
        while self._step(pieces, final):
            pass
        return pieces

    @abstractmethod
    def _step(self, pieces: list[Piece], final: bool) -> bool:
        """Decide on a piece of the text; False when more of it is needed."""
