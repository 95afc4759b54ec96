"""Which dataset rows an epoch rolls out, where it does not roll out all of them."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

RowChoice = Callable[[Sequence[str]], Collection[str]]
"""The ids of a dataset's rows, in its order -> those to run."""


@dataclass(frozen=True, slots=True)
class RowBatches:
    """Passes over a dataset, each in an order of its own and divided into epochs.

    The rows are a function of seed and epoch alone, so a resumed run goes on with those that an unbroken one has.

    Attributes:
        size: rows of an epoch; the last epoch of a pass has those that are left. None: all rows.
    """

    size: int | None
    seed: int

    def epochs_per_pass(self, rows: int) -> int:
        """Epochs after which each of ``rows`` rows has been rolled out once more."""
        return 1 if self.size is None else max(1, math.ceil(rows / self.size))

    def rows(self, row_ids: Sequence[str], epoch: int) -> list[str]:
        """The rows of ``epoch``, counted from 0, in the dataset's order."""
        if self.size is None:
            return list(row_ids)
        number, position = divmod(epoch, self.epochs_per_pass(len(row_ids)))
        order = list(row_ids)
        random.Random(f"{self.seed}/{number}").shuffle(order)
        chosen = set(order[position * self.size : (position + 1) * self.size])
        return [row_id for row_id in row_ids if row_id in chosen]
