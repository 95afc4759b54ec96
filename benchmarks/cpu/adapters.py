"""Six requests at once to six adapters, over six at once to one adapter: CPU seconds of the sampler, side by side.

    python -W ignore benchmarks/cpu/adapters.py [--base-model builtin/smollm2-135m] [--rank 32] [--adapters 6]

Prompts are random and share nothing, so both sides compute the same tokens. ``first`` is the first round of new
adapters, with all that is prepared for them; ``again`` are later rounds of the same ones. A round of one side follows
a round of the other, and a figure is the median of its rounds.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from tinker import types

from nat_plugin_evsys.engine.model.loading import BaseModel, load_base_model
from nat_plugin_evsys.engine.model.lora import LoraAdapter
from nat_plugin_evsys.engine.sampler import Sampler
from nat_plugin_evsys.runtime import defaults

PROMPT_TOKENS = 64


def perturbed(base: BaseModel, rank: int, seed: int) -> LoraAdapter:
    """An adapter as the policy's defaults make it, with B not zero."""
    adapter = LoraAdapter.create(
        base.model,
        rank=rank,
        alpha=defaults.ALPHA,
        train_attn=defaults.TRAIN_ATTN,
        train_mlp=defaults.TRAIN_MLP,
        train_unembed=defaults.TRAIN_UNEMBED,
    )
    generator = torch.Generator().manual_seed(seed)
    for _, b in adapter.weights.values():
        b.data.normal_(0.0, 1e-3, generator=generator)
    return adapter


class Rounds:
    """One request a client at once, and what that takes."""

    def __init__(self, sampler: Sampler, tokens: int) -> None:
        self._sampler = sampler
        self._tokens = tokens
        self._random = random.Random(0)

    def seconds(self, clients: Sequence[Any]) -> float:
        """CPU seconds of this process for one request of new random tokens to each client."""
        params = types.SamplingParams(max_tokens=self._tokens, temperature=1.0, seed=1, stop=[])
        prompts = [
            types.ModelInput.from_ints([self._random.randrange(100, 10_000) for _ in range(PROMPT_TOKENS)])
            for _ in clients
        ]
        start = time.process_time()
        with self._sampler._wake:  # all of them are in the inbox before the first is taken
            futures = [client.sample(prompt, 1, params) for client, prompt in zip(clients, prompts, strict=True)]
        for future in futures:
            future.result()
        return time.process_time() - start


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-model", default="builtin/smollm2-135m")
    parser.add_argument("--rank", type=int, default=defaults.RANK)
    parser.add_argument("--adapters", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8, 64])
    args = parser.parse_args()
    base = load_base_model(args.base_model, device="cpu", dtype="float32")
    sampler = Sampler(base)
    assert not sampler.plain_because, sampler.plain_because
    adapters = [perturbed(base, args.rank, seed) for seed in range(args.adapters)]
    print(f"| tokens | round | one adapter, s | {args.adapters} adapters, s | ratio |\n|---|---|---|---|---|")
    for tokens in args.tokens:
        rounds = Rounds(sampler, tokens)
        found: dict[str, tuple[list[float], list[float]]] = {"first": ([], []), "again": ([], [])}
        rounds.seconds([sampler.client(adapters[0], 0), sampler.client(adapters[1], 1)])  # once, for the process
        for _ in range(args.rounds):
            one = [sampler.client(adapters[0], 0)] * args.adapters
            six = [sampler.client(adapter, at) for at, adapter in enumerate(adapters)]
            for kind in ("first", "again", "again"):
                for side, clients in enumerate((one, six)):
                    found[kind][side].append(rounds.seconds(clients))
        for kind, sides in found.items():
            one_s, six_s = (statistics.median(side) for side in sides)
            print(f"| {tokens} | {kind} | {one_s:.2f} | {six_s:.2f} | {six_s / one_s:.2f} |", flush=True)
    sampler.close()


if __name__ == "__main__":
    main()
