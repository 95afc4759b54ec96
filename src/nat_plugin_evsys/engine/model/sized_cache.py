"""What is kept within a bound of bytes; what was used last stays longest."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any, Generic, TypeVar

from torch import Tensor

K = TypeVar("K")
V = TypeVar("V")


class SizedCache(Generic[K, V]):
    """Values by key. Not for several threads at once.

    Args:
        most_bytes: of all values together. A single value may be larger, unless this is 0, which keeps nothing.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._kept: OrderedDict[K, tuple[V, int]] = OrderedDict()
        self.nbytes = 0

    def __iter__(self) -> Iterator[K]:
        """The keys, the one used longest ago first."""
        return iter(self._kept)

    def get(self, key: K) -> V | None:
        """The value, or None."""
        if key not in self._kept:
            return None
        self._kept.move_to_end(key)
        return self._kept[key][0]

    def put(self, key: K, value: V, nbytes: int) -> None:
        """Keep a value, unless there is one of this key; what was used longest ago makes room."""
        if key in self._kept or self._most_bytes <= 0:
            return
        self._kept[key] = value, nbytes
        self.nbytes += nbytes
        while self.nbytes > self._most_bytes and len(self._kept) > 1:
            self.nbytes -= self._kept.popitem(last=False)[1][1]

    def pop(self, key: K) -> V | None:
        """The value, which is no longer kept, or None."""
        if key not in self._kept:
            return None
        value, nbytes = self._kept.pop(key)
        self.nbytes -= nbytes
        return value

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()
        self.nbytes = 0


def size_of(values: Iterable[Any]) -> int:
    """Bytes of the tensors among ``values``."""
    return sum(value.nbytes for value in values if isinstance(value, Tensor))
