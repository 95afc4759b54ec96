"""What a ``DecodeBatch`` needs from the memory and forward passes of its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from nat_plugin_evsys.engine.model.images import PlacedImage
from nat_plugin_evsys.engine.sampling.kv_cache import SlotStore


@dataclass(eq=False)
class Context:
    """Tokens that new rows continue from.

    Attributes:
        tokens: all of them; at least one.
        rows: how many rows continue from them.
        most: tokens that any of these rows may sample.
        known: how many of the tokens needed no computing; set when it joins.
        images: what placeholders among the tokens stand for; only an ``ExactDecoder`` takes any.
    """

    tokens: list[int]
    rows: int = 1
    most: int = 0
    known: int = 0
    images: tuple[PlacedImage, ...] = ()


class RowDecoder(Protocol):
    """The rows of one policy. Row i is known by its number; a new one comes last."""

    @property
    def kv_bytes(self) -> int:
        """Bytes that its rows hold, and those that wait are going to."""
        ...

    def join(self, context: Context) -> None:
        """Let a context's rows join as soon as its tokens have been read, in the next step or a later one."""
        ...

    def leave(self, context: Context) -> None:
        """Forget a context that has not been read; without effect on one that does not wait."""
        ...

    def step(self, tokens: Sequence[int]) -> tuple[Tensor, list[Context]]:
        """Feed the rows' last tokens, and waiting contexts as far as a pass allows.

        Returns:
            Logits [rows + contexts, V]: one for each row there was, then one for each context that has been read; and
            those contexts, whose rows are now there. If it fails, no row is new and every context still waits.
        """
        ...

    def remove(self, row: int, tokens: list[int] | None) -> None:
        """Take out a row; the last one gets its number. ``tokens``, all it has read, are kept; None: nothing is.

        If keeping them fails, the row is out all the same.
        """
        ...

    def keep(self, tokens: list[int], store: SlotStore, slot: int) -> None:
        """Keep what a slot of another store holds: the keys and values of ``tokens``."""
        ...

    def fits(self, contexts: Sequence[Context]) -> bool:
        """Whether memory takes one token more of each row, and ``contexts`` with a first token of their rows."""
        ...

    def close(self) -> None:
        """Release everything."""
        ...
