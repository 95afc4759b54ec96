"""``deterministic: true``: what is sampled does not depend on what goes on beside it.

That whole runs are equal, killed ones too, is what ``benchmarks/reliability/kill_finetune.py`` shows.
"""

from __future__ import annotations

import asyncio
from typing import Any

from tinker import ModelInput, types

from nat_plugin_evsys.backends.local import LocalBackend

PROMPTS = [[7 * i % 90 + 4, *range(5, 9 + 3 * (i % 4))] for i in range(6)]


async def sample(backend: LocalBackend, number: int, count: int = 1) -> tuple[list[int], list[float]]:
    client = await backend.snapshot_sampling_client()
    params = types.SamplingParams(max_tokens=12, seed=number, temperature=1.3)
    sampled = await client.sample_async(ModelInput.from_ints(PROMPTS[number]), count, params)
    return list(sampled.sequences[0].tokens), list(sampled.sequences[0].logprobs or [])


async def test_company_changes_no_bit(make_backend: Any) -> None:
    one, other = await make_backend(), await make_backend()
    for backend in (one, other):
        backend._shared._deterministic = True  # ``create`` would also put the whole process onto one thread
    alone = [await sample(one, number) for number in range(len(PROMPTS))]
    order = [4, 1, 5, 0, 3, 2]
    together = await asyncio.gather(*(sample(other, number, count=3) for number in order))
    assert [alone[number] for number in order] == list(together)
    assert all(tokens for tokens, _ in alone)


async def test_company_changes_no_bit_of_prompt_logprobs(make_backend: Any) -> None:
    backend = await make_backend()
    backend._shared._deterministic = True
    client = await backend.snapshot_sampling_client()
    prompts = [ModelInput.from_ints([*prompt, *range(10, 60)]) for prompt in PROMPTS]
    alone = [await client.compute_logprobs_async(prompt) for prompt in prompts]
    asked = [ModelInput.from_ints(range(4, 4 + 9 * n)) for n in range(1, 9)]
    together = await asyncio.gather(*(client.compute_logprobs_async(prompt) for prompt in [*asked, *prompts]))
    assert together[len(asked) :] == alone
