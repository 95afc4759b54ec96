"""The training workloads: token ids and a mask of what is trained, random but for what they share."""

from __future__ import annotations

import random
from dataclasses import dataclass

Sequence = tuple[list[int], list[bool]]
"""Token ids and, for each, whether it was sampled by the policy (and so is trained)."""


@dataclass(frozen=True)
class Shape:
    """Model and lengths. ``family`` is qwen3, llama or gemma3; ``divide`` shortens every length, for quick runs."""

    vocab: int = 32_000
    hidden: int = 640
    inner: int = 1_920
    layers: int = 8
    heads: int = 10
    kv_heads: int = 5
    head_dim: int = 64
    divide: int = 1
    family: str = "qwen3"

    @property
    def linears(self) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """``(in, out)`` of a layer's matrices: those of keys and values, and the others."""
        query, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        others = [(self.hidden, query), (query, self.hidden)]
        others += [(self.hidden, self.inner)] * 2 + [(self.inner, self.hidden)]
        return [(self.hidden, kv)] * 2, others


FULL = Shape()  # 60M parameters
SMALL = Shape(vocab=2_000, hidden=128, inner=384, layers=2, heads=2, kv_heads=1, divide=4)


def workload(name: str, shape: Shape) -> list[Sequence]:
    """``W1``, ``W1half``, ``W2``, ``W2v``, ``W3``, ``W3x<n>`` with n > 1 sequences, or ``G<n>``: n samples as in W1."""
    rng = random.Random(name)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(shape.vocab) for _ in range(count // shape.divide)]

    if name in ("W1", "W1half"):
        return [s for _ in range(4 if name == "W1" else 2) for s in _group(tokens, 8)]
    if name.startswith("G"):
        return _group(tokens, int(name[1:]))
    if name in ("W2", "W2v"):
        return _agentic(tokens, branching=name == "W2v")
    if name.startswith("W3"):
        count = int(name[3:] or 12)
        # Evenly spaced: a dozen drawn at random need not come near the ends, and padding goes by the longest.
        lengths = [64 + 960 * i // (count - 1) for i in range(count)]
        rng.shuffle(lengths)
        return [(own, [True] * len(own)) for own in map(tokens, lengths)]
    raise ValueError(f"workload {name!r} is unknown")


def _group(tokens, samples: int) -> list[Sequence]:  # type: ignore[no-untyped-def]
    shared = tokens(512)
    own = [tokens(64) for _ in range(samples)]
    return [(shared + o, [False] * len(shared) + [True] * len(o)) for o in own]


def _agentic(tokens, *, branching: bool) -> list[Sequence]:  # type: ignore[no-untyped-def]
    """8 trajectories of 4 turns after 1,024 shared tokens; branching: they part after 0, 1, 2 and 3 common turns."""
    shared = tokens(1024)

    def turn() -> Sequence:
        sampled, tool = tokens(48), tokens(64)
        return sampled + tool, [True] * len(sampled) + [False] * len(tool)

    out: list[Sequence] = []
    common = [turn() for _ in range(4)]
    for index in range(8):
        kept = index // 2 if branching else 0
        turns = common[:kept] + [turn() for _ in range(4 - kept)]
        ids, mask = list(shared), [False] * len(shared)
        for turn_ids, turn_mask in turns:
            ids, mask = ids + turn_ids, mask + turn_mask
        out.append((ids, mask))
    return out
