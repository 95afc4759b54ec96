"""Sampled logprobs against those of ``forward``, over two turns, so that the second one finds its prefix cached."""

from __future__ import annotations

import random
from typing import Literal

import torch
from findings import Findings
from models import engine_model
from place import Place
from tinker import types

from nat_plugin_evsys.engine.gradient.trainable import TrainableModel
from nat_plugin_evsys.engine.sampler import Sampler
from nat_plugin_evsys.engine.sampling.client import LocalSamplingClient

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 0.1}
"""Of the difference in nats."""

PATHS: tuple[Literal["auto", "plain"], ...] = ("auto", "plain")
Sampled = tuple[list[int], list[int], list[float]]
"""Prompt, sampled tokens, their logprobs."""


def check(findings: Findings, place: Place, family: str) -> None:
    """In both precisions, by the sampler's default path and by its plain one."""
    for dtype, bound in BOUNDS.items():
        base, adapter = engine_model(place.exact_shape(family), place.device, dtype)
        trainable = TrainableModel(base, adapter)
        for path in PATHS:
            # Five rows for a dozen sequences: they join and leave while others are decoded.
            sampler = Sampler(base, max_batch_size=5, path=path)
            try:
                sampled = _episode(sampler.client(adapter, 0), base.vocab_size)
            finally:
                sampler.close()
            name = f"{family} sampler ({path}) vs forward, {str(dtype).removeprefix('torch.')}"
            findings.exact(name, _largest_difference(trainable, sampled), bound)


def _episode(client: LocalSamplingClient, vocabulary: int) -> list[Sampled]:
    rng = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(vocabulary) for _ in range(count)]

    shared = tokens(40)
    first = _turn(client, [shared + tokens(n) for n in (1, 9, 20)] + [shared[:5]], seed=1)
    second = _turn(client, [prompt + sampled + tokens(6) for prompt, sampled, _ in first[::3]], seed=100)
    return first + second


def _turn(client: LocalSamplingClient, prompts: list[list[int]], seed: int) -> list[Sampled]:
    """Three samples of unequal length after each prompt, all asked for at once."""
    futures = [
        client.sample(prompt, 3, types.SamplingParams(max_tokens=8 + 3 * i, temperature=1.0, seed=seed + i, stop=[]))
        for i, prompt in enumerate(prompts)
    ]
    return [
        (prompt, sequence.tokens, list(sequence.logprobs or []))
        for prompt, future in zip(prompts, futures, strict=True)
        for sequence in future.result().sequences
    ]


def _largest_difference(trainable: TrainableModel, sampled: list[Sampled]) -> float:
    data = [
        types.Datum(types.ModelInput.from_ints((prompt + tokens)[:-1]), {"target_tokens": (prompt + tokens)[1:]})
        for prompt, tokens, _ in sampled
    ]
    outputs = trainable.forward(data, "cross_entropy").loss_fn_outputs
    differences = [
        (output["logprobs"].to_torch()[len(prompt) - 1 :] - torch.tensor(logprobs)).abs()
        for output, (prompt, _, logprobs) in zip(outputs, sampled, strict=True)
    ]
    return float(torch.cat(differences).max())
