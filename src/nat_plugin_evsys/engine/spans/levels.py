"""What the tokens of a pass see above themselves, read together where it is the same."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nat_plugin_evsys.engine.spans.attention import Level, Read

Chain = list[tuple[Tensor, int]]
"""What tokens see above themselves: keys and values, and how many of their columns."""


def levels_of(chains: Sequence[tuple[range, Chain]]) -> list[Level]:
    """The n-th link of every chain makes level n; tokens that see the same there are read together."""
    levels = []
    for depth in range(max((len(chain) for _, chain in chains), default=0)):
        groups: dict[tuple[int, int], tuple[Tensor, list[int]]] = {}
        for tokens, chain in chains:
            if depth < len(chain):
                kv, length = chain[depth]
                groups.setdefault((id(kv), length), (kv, []))[1].extend(tokens)
        reads: list[Read] = []
        order: list[int] = []
        for (_, length), (kv, members) in groups.items():
            reads.append(Read(len(order), len(order) + len(members), kv, length))
            order += members
        side_by_side = order == list(range(order[0], order[0] + len(order)))
        where = slice(order[0], order[0] + len(order)) if side_by_side else torch.tensor(order)
        levels.append(Level(where, reads))
    return levels
