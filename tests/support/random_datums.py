"""Random Datums, each kind a function of its seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import cast

from tinker import types
from tiny import BYTES, VOCAB


def datum(tokens: Sequence[int], inputs: Mapping[str, Sequence[float]]) -> types.Datum:
    """A Datum whose inputs are plain lists, as a user writes them; Tinker's type makes tensors of them."""
    return types.Datum(types.ModelInput.from_ints(list(tokens)), cast(types.LossFnInputs, dict(inputs)))


def byte_datums(seed: int, count: int = 3, length: int = 10) -> list[types.Datum]:
    """cross_entropy Datums of byte tokens."""
    rng = random.Random(seed)
    rows = [[rng.randrange(BYTES) for _ in range(length)] for _ in range(count)]
    return [datum(row[:-1], {"target_tokens": row[1:]}) for row in rows]


def ragged(seed: int, count: int = 5, shortest: int = 2, longest: int = 20) -> list[list[int]]:
    """Token sequences of unequal lengths."""
    rng = random.Random(seed)
    return [[rng.randrange(VOCAB) for _ in range(rng.randint(shortest, longest))] for _ in range(count)]


def ce_datums(seed: int, count: int = 5) -> list[types.Datum]:
    """Ragged cross_entropy Datums with weights of any sign, some of them zero."""
    rng = random.Random(seed)
    data = []
    for tokens in ragged(seed, count):
        weights = [rng.choice([0.0, 1.0, rng.uniform(-1, 1)]) for _ in tokens[1:]]
        data.append(datum(tokens[:-1], {"target_tokens": tokens[1:], "weights": weights}))
    return data


def rl_datums(seed: int, **extra: Callable[[int, random.Random], list[float]]) -> list[types.Datum]:
    """Ragged Datums with a prompt of advantage 0 and signed advantages after it.

    Args:
        extra: more inputs by name, each from a Datum's length and a generator.
    """
    rng = random.Random(seed)
    data = []
    for tokens in ragged(seed, shortest=4):
        n = len(tokens) - 1
        prompt = rng.randint(0, n - 1)
        inputs: dict[str, Sequence[float]] = {
            "target_tokens": tokens[1:],
            "logprobs": [0.0] * prompt + [rng.uniform(-6.5, -4.0) for _ in range(n - prompt)],
            "advantages": [0.0] * prompt + [rng.uniform(-1.5, 1.5) for _ in range(n - prompt)],
            **{key: make(n, rng) for key, make in extra.items()},
        }
        data.append(datum(tokens[:-1], inputs))
    return data


def related_sequences(rng: random.Random, count: int, longest: int) -> list[list[int]]:
    """Up to ``longest`` tokens each: branches of branches, extensions, prefixes, duplicates, single tokens."""
    out = [[rng.randrange(VOCAB) for _ in range(rng.randint(1, longest))]]
    while len(out) < count:
        base = rng.choice(out)
        kind = rng.choice(["branch", "branch", "extend", "prefix", "duplicate", "single", "stranger"])
        kept = {
            "branch": base[: rng.randint(0, len(base))],
            "extend": base,
            "prefix": base[: rng.randint(1, len(base))],
            "duplicate": base,
        }.get(kind, [])
        new = {"prefix": 0, "duplicate": 0, "single": 1}.get(kind, rng.randint(1, max(1, longest // 3)))
        out.append((kept + [rng.randrange(VOCAB) for _ in range(new)])[:longest])
    return out


def related_datums(seed: int, loss_fn: str = "ppo", count: int = 7, longest: int = 24) -> list[types.Datum]:
    """Datums that share, repeat and extend each other's tokens, with different advantages."""
    rng = random.Random(seed)
    data = []
    for tokens in related_sequences(rng, count, longest):
        n = len(tokens)
        targets = [*tokens[1:], rng.randrange(VOCAB)]
        masked = rng.randint(0, n - 1)
        trained = [i >= masked and rng.random() < 0.8 for i in range(n)]
        inputs: dict[str, Sequence[float]] = {"target_tokens": targets}
        if loss_fn == "cross_entropy":
            inputs["weights"] = [rng.uniform(-1, 1) if t else 0.0 for t in trained]
        else:
            inputs["logprobs"] = [rng.uniform(-5.5, -3.5) for _ in range(n)]
            inputs["advantages"] = [rng.uniform(-1.5, 1.5) if t else 0.0 for t in trained]
        if loss_fn == "gspo":
            inputs["sequence_ratio_mask"] = [1.0] * n
        data.append(datum(tokens, inputs))
    return data
