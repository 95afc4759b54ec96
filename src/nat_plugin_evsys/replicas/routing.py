"""Which replica a request goes to: the one that holds its prefix, unless that one has much more to do."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

BLOCK = 16
"""Prefixes are compared in blocks of so many tokens."""

TOGETHER = 8
"""So many sequences more than on the least loaded replica (and an eighth of those) may be in flight on one that holds
the prefix: a group stays together, and what all prompts begin with is soon held by all."""

_KEPT_BLOCKS = 65536


class PrefixRoutes:
    """Remembers which replica has read which prefixes of which policy. Not thread-safe.

    A prefix is the chain of its blocks, each known by the hash of all tokens up to its end, as in vLLM's prefix cache.
    A wrong guess costs time and nothing else: the replica then reads the prompt.
    """

    def __init__(self) -> None:
        self._holders: OrderedDict[int, set[int]] = OrderedDict()

    def choose(self, policy: str, prompt: Sequence[int], loads: Sequence[int]) -> int:
        """The replica for a prompt, and remember it.

        Of the replicas that are not much more loaded than the least loaded one, the one that holds the longest prefix;
        of several, the least loaded one.

        Args:
            policy: key of the weights; what one policy has read does not help another.
            loads: sequences in flight on each replica.
        """
        chain = self._chain(policy, prompt)
        held = [0] * len(loads)
        for block in chain:
            for replica in self._holders.get(block, ()):
                held[replica] += 1
        least = min(loads)
        free = [replica for replica, load in enumerate(loads) if load < least + TOGETHER + least // 8]
        chosen = min(free, key=lambda replica: (-held[replica], loads[replica], replica))
        for block in chain:
            self._holders.setdefault(block, set()).add(chosen)
            self._holders.move_to_end(block)
        while len(self._holders) > _KEPT_BLOCKS:
            self._holders.popitem(last=False)
        return chosen

    def forget(self, replica: int) -> None:
        """It was started again and holds nothing."""
        for holders in self._holders.values():
            holders.discard(replica)

    def _chain(self, policy: str, prompt: Sequence[int]) -> list[int]:
        chain, above = [], hash(policy)
        for start in range(0, len(prompt) - BLOCK + 1, BLOCK):
            above = hash((above, tuple(prompt[start : start + BLOCK])))
            chain.append(above)
        return chain
