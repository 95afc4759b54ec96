"""What is kept of sequences with images, so that a request that begins as one of them does is not read again."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nat_plugin_evsys.engine.model.images import PlacedImage, images_key
from nat_plugin_evsys.engine.model.sized_cache import SizedCache, size_of


@dataclass(frozen=True, slots=True)
class ReadPrefix:
    """A sequence that was read.

    Attributes:
        length: of its tokens.
        cache: transformers' own, of all of them; to be copied before anything goes on from it.
        logits: after the last one, [V]; None where they were not kept.
    """

    length: int
    cache: Any
    logits: Tensor | None


class ExactPrefixes:
    """Read sequences by policy, tokens and images. A sequence is found only whole, with exactly its images.

    Args:
        most_bytes: of all caches together.
    """

    def __init__(self, most_bytes: int) -> None:
        self._kept = SizedCache[tuple[int, bytes, bytes], ReadPrefix](most_bytes)

    @property
    def nbytes(self) -> int:
        """Of all caches together."""
        return self._kept.nbytes

    def find(self, policy: int, tokens: Sequence[int], images: Sequence[PlacedImage]) -> ReadPrefix | None:
        """The longest sequence that ``tokens`` start with and that has all of ``images`` and no other; None without.

        One of all the tokens is found only with its logits.
        """
        lengths = Counter(len(kept) // _ITEM for ident, kept, _ in self._kept if ident == policy)
        first = images[-1].end if images else 1
        seen, whole = images_key(images), array("i", tokens)
        for length in sorted(lengths, reverse=True):
            if not first <= length <= len(whole):
                continue
            found = self._kept.get((policy, whole[:length].tobytes(), seen))
            if found is not None and (length < len(whole) or found.logits is not None):
                return found
        return None

    def keep(
        self,
        policy: int,
        tokens: Sequence[int],
        images: Sequence[PlacedImage],
        cache: Any,
        logits: Tensor | None = None,
    ) -> ReadPrefix:
        """Keep a sequence that was read; ``cache`` is not changed from now on."""
        size = sum(size_of(vars(layer).values()) for layer in cache[1].layers)
        key = policy, array("i", tokens).tobytes(), images_key(images)
        prefix = ReadPrefix(len(tokens), cache, logits)
        self._kept.put(key, prefix, size)
        return prefix

    def forget(self, policy: int) -> None:
        """Forget the sequences of a policy."""
        for key in [key for key in self._kept if key[0] == policy]:
            self._kept.pop(key)

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()


_ITEM = array("i").itemsize
