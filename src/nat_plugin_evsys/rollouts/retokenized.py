"""Replies whose text is tokenised again, and how often that gives other tokens than were sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(slots=True)
class Drift:
    """How far text leads back to the tokens that were sampled, measured where those are known.

    Attributes:
        compared: replies whose own tokens, or at least their number, are known.
        drifted: those of them that are other tokens once their text is tokenised.
    """

    compared: int = 0
    drifted: int = 0

    def compare(self, ids: Sequence[int], rendered: Sequence[int]) -> None:
        """Compare a reply's own tokens with those of its text; a reply that was cut off has no end of its turn."""
        self._count(list(ids) not in (list(rendered), list(rendered[:-1])))

    def compare_length(self, tokens: int, rendered: int, *, exactly: bool = False) -> None:
        """The same where only their number is known; unless ``exactly``, with or without the end of the turn."""
        self._count(tokens != rendered and (exactly or tokens != rendered - 1))

    @property
    def share(self) -> float | None:
        """Of the compared replies, how many drifted; None where none could be compared."""
        return self.drifted / self.compared if self.compared else None

    def _count(self, differs: bool) -> None:
        self.compared += 1
        self.drifted += differs

    def __str__(self) -> str:
        if not self.compared:
            return "drift unknown, since no reply's own tokens are recorded"
        return f"drift: {self.drifted} of {self.compared} replies whose tokens are recorded are others as text"
