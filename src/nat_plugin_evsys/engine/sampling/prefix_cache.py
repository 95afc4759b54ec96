"""KV of token prefixes that were computed before, kept within a memory bound.

A tree of blocks of 16 tokens a policy: a block is found by its exact tokens and its parent block, so equal prefixes of
many sequences are stored once and nothing is matched by hash alone. Keys and values depend on the weights; a policy's
blocks are therefore never given to another policy.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from itertools import count

from torch import Tensor

from nat_plugin_evsys.engine.sampling.kv_cache import SlotStore

BLOCK = 16

_BlockKey = tuple[int, tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class _Block:
    ident: int
    kv: Tensor


class PrefixCache:
    """Least-recently-used blocks are dropped first. A parent is never older than its children, so children go first.

    Args:
        max_bytes: bound on the memory of all blocks; 0 turns the cache off.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.used_bytes = 0
        self._blocks: OrderedDict[_BlockKey, _Block] = OrderedDict()
        self._idents = count(1)
        self._roots: dict[Hashable, int] = {}

    def load(self, policy: Hashable, tokens: list[int], store: SlotStore, slot: int) -> int:
        """Write the longest known prefix of ``tokens`` into a slot. Returns its length, less than ``len(tokens)``.

        The last token is always left to be fed, since its logits are what the caller wants.
        """
        path = self._walk(policy, tokens, (len(tokens) - 1) // BLOCK)
        self._touch([key for key, _ in path])
        return store.write(slot, [block.kv for _, block in path])

    def add(self, policy: Hashable, tokens: list[int], store: SlotStore, slot: int) -> None:
        """Keep the complete blocks of ``tokens``, whose keys and values a slot holds."""
        whole = len(tokens) // BLOCK
        if self.max_bytes <= 0 or whole == 0:
            return
        path = self._walk(policy, tokens, whole)
        keys = [key for key, _ in path]
        parent = path[-1][1].ident if path else self._root(policy)
        for i in range(len(path), whole):
            key = (parent, tuple(tokens[i * BLOCK : (i + 1) * BLOCK]))
            block = _Block(next(self._idents), store.read(slot, i * BLOCK, (i + 1) * BLOCK).clone())
            self._blocks[key] = block
            self.used_bytes += block.kv.nbytes
            keys.append(key)
            parent = block.ident
        self._touch(keys)
        self._shrink()

    def forget(self, policy: Hashable) -> None:
        """Drop the blocks of a policy."""
        gone = {self._roots.pop(policy, None)}
        for key, block in reversed(list(self._blocks.items())):  # parents first
            if key[0] in gone:
                gone.add(block.ident)
                self.used_bytes -= block.kv.nbytes
                del self._blocks[key]

    def clear(self) -> None:
        """Drop everything."""
        self._blocks.clear()
        self._roots.clear()
        self.used_bytes = 0

    def _root(self, policy: Hashable) -> int:
        if policy not in self._roots:
            self._roots[policy] = next(self._idents)
        return self._roots[policy]

    def _walk(self, policy: Hashable, tokens: list[int], blocks: int) -> list[tuple[_BlockKey, _Block]]:
        path: list[tuple[_BlockKey, _Block]] = []
        parent = self._root(policy)
        for i in range(blocks):
            key = (parent, tuple(tokens[i * BLOCK : (i + 1) * BLOCK]))
            block = self._blocks.get(key)
            if block is None:
                break
            path.append((key, block))
            parent = block.ident
        return path

    def _touch(self, keys: list[_BlockKey]) -> None:
        for key in reversed(keys):
            self._blocks.move_to_end(key)

    def _shrink(self) -> None:
        while self.used_bytes > self.max_bytes and self._blocks:
            _, block = self._blocks.popitem(last=False)
            self.used_bytes -= block.kv.nbytes
