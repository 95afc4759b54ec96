"""The sampler's logprobs are the trainer's, for every family, with an adapter that is far from zero.

Both sides are reached through the public ``Backend``; a third computation (transformers alone, float64, the adapter
merged) stands for the temperatures that ``forward`` does not have.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_reference import PlainModel, double_leaves
from tinker import types
from tiny import PROVED, VOCAB, perturb
from torch import Tensor

from nat_plugin_evsys.backends.base import Backend, SamplingClient
from nat_plugin_evsys.backends.local import LocalBackend
from nat_plugin_evsys.engine.model.lora import LoraAdapter

TOLERANCE = 1e-5
TEMPERATURES = (0.5, 1.0, 1.5)
RANK, ALPHA = 4, 8.0
Sampled = tuple[list[int], list[int], list[float], float]
"""Prompt, sampled tokens, their logprobs, temperature."""


async def sample_turn(
    client: SamplingClient, prompts: list[list[int]], num_samples: int, seed: int
) -> tuple[list[Sampled], int]:
    """All prompts at all temperatures at once; also how many prompt tokens the prefix cache knew."""
    wanted = [(p, t) for p in prompts for t in TEMPERATURES]
    calls = [
        client.sample_async(
            types.ModelInput.from_ints(prompt),
            num_samples,
            types.SamplingParams(max_tokens=8 + 3 * (i % 5), temperature=temperature, seed=seed + i, stop=[]),
        )
        for i, (prompt, temperature) in enumerate(wanted)
    ]
    results = await asyncio.gather(*calls)
    sampled = [
        (prompt, sequence.tokens, list(sequence.logprobs or []), temperature)
        for (prompt, temperature), result in zip(wanted, results, strict=True)
        for sequence in result.sequences
    ]
    return sampled, sum(result.prompt_cache_hit_tokens or 0 for result in results)


async def episode(client: SamplingClient) -> tuple[list[Sampled], int]:
    """Two turns: prompts that share a beginning, then prompts that extend what was sampled."""
    rng = random.Random(0)
    shared = [rng.randrange(VOCAB) for _ in range(40)]
    prompts = [shared + [rng.randrange(VOCAB) for _ in range(n)] for n in (1, 9, 20)] + [shared[:5]]
    first, _ = await sample_turn(client, prompts, 3, seed=1)
    longer = [prompt + tokens + [rng.randrange(VOCAB) for _ in range(6)] for prompt, tokens, _, _ in first[::7]]
    second, hits = await sample_turn(client, longer, 2, seed=100)
    return first + second, hits


async def forward_logprobs(backend: Backend, sampled: list[Sampled]) -> list[Tensor]:
    """Logprob (T = 1) of each sampled token by ``forward`` over all sequences in one call."""
    data = []
    for prompt, tokens, _, _ in sampled:
        ids = prompt + tokens
        data.append(types.Datum(types.ModelInput.from_ints(ids[:-1]), {"target_tokens": ids[1:]}))
    output = await backend.forward_async(data, loss_fn="cross_entropy")
    return [
        out["logprobs"].to_torch()[len(prompt) - 1 :]
        for out, (prompt, _, _, _) in zip(output.loss_fn_outputs, sampled, strict=True)
    ]


def plain_logprobs(plain: PlainModel, adapter: LoraAdapter, sampled: list[Sampled]) -> list[Tensor]:
    """Logprob of each sampled token under the tempered distribution of the plain model."""
    matrices, found = double_leaves(adapter.weights), []
    with torch.no_grad():
        for prompt, tokens, _, temperature in sampled:
            rows = plain.log_softmax([prompt + tokens], matrices, ALPHA / RANK, temperature)[0]
            rows = rows[len(prompt) - 1 : len(prompt) + len(tokens) - 1]
            found.append(rows.gather(1, torch.tensor(tokens)[:, None])[:, 0])
    return found


def furthest(one: list[Tensor], other: list[Tensor]) -> float:
    return max(float((a.double() - b.double()).abs().max()) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("family", list(PROVED))
async def test_sampled_logprobs_are_the_trainers(
    family: str,
    base_of: Callable[[str], Any],
    plain_of: Callable[[str], PlainModel],
    measured: Callable[..., None],
    tmp_path: Path,
) -> None:
    base = base_of(family)
    adapter = perturb(LoraAdapter.create(base.model, rank=RANK, alpha=ALPHA, train_unembed=True), seed=3)
    # Five rows for a dozen requests of unequal length: sequences join and leave while others are decoded.
    backend = LocalBackend(base, adapter, checkpoint_dir=tmp_path, max_batch_size=5)
    try:
        sampled, hits = await episode(await backend.snapshot_sampling_client())
        trainer = await forward_logprobs(backend, sampled)
    finally:
        await backend.close()
    assert hits > 0, "the prefix cache must have been in play"
    sampler = [torch.tensor(logprobs) for _, _, logprobs, _ in sampled]
    plain = plain_logprobs(plain_of(family), adapter, sampled)
    untempered = plain_logprobs(plain_of(family), adapter, [(p, t, lp, 1.0) for p, t, lp, _ in sampled])
    bare = LoraAdapter(RANK, ALPHA, {n: (a, torch.zeros_like(b)) for n, (a, b) in adapter.weights.items()})
    assert furthest(plain_logprobs(plain_of(family), bare, sampled), plain) > 0.1, "the adapter must matter"

    at_one = [i for i, row in enumerate(sampled) if row[3] == 1.0]
    tokens = sum(len(row[1]) for row in sampled)
    proof = "2 sampler and trainer"
    worst = furthest([sampler[i] for i in at_one], [trainer[i] for i in at_one])
    count = sum(len(sampled[i][1]) for i in at_one)
    measured(proof, "sampler vs `forward`, T = 1", PROVED[family], worst=worst, bound=TOLERANCE, tokens=count)
    worst = furthest(trainer, untempered)
    measured(proof, "`forward` vs plain float64, T = 1", PROVED[family], worst=worst, bound=TOLERANCE, tokens=tokens)
    for temperature in TEMPERATURES:
        here = [i for i, row in enumerate(sampled) if row[3] == temperature]
        worst = furthest([sampler[i] for i in here], [plain[i] for i in here])
        count = sum(len(sampled[i][1]) for i in here)
        compared = f"sampler vs plain float64, T = {temperature:g}"
        measured(proof, compared, PROVED[family], worst=worst, bound=TOLERANCE, tokens=count)
