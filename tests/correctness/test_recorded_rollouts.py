"""The whole serving path: what the policy endpoint recorded is what ``forward`` computes.

An OpenAI client holds conversations with tools with a policy that has been trained away from zero on its own calls.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import openai
import pytest
import pytest_asyncio
import torch
from peft import PeftModel
from tinker import types
from transformers import AutoModelForCausalLM

from nat_plugin_evsys.calls import RUN_ID_HEADER, Call
from nat_plugin_evsys.config.policy import EvsysPolicyConfig
from nat_plugin_evsys.policy.policy import Policy
from nat_plugin_evsys.rollouts.datums import chain_datum, token_chains

TOLERANCE = 1e-4
ADAM = types.AdamParams(learning_rate=2e-3)
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}},
    },
}


@pytest_asyncio.fixture
async def policy(tmp_path: Path) -> AsyncIterator[Policy]:
    """A policy over builtin/tiny in fp32, as `nat finetune` begins with it."""
    config = EvsysPolicyConfig(
        base_model="builtin/tiny", output_dir=tmp_path, lora_rank=8, device="cpu", dtype="float32", max_batch_size=6
    )
    made = Policy(config)
    made.begin_training()
    await made.ensure_loaded()
    made.set_checkpoint_dir(tmp_path)
    yield made
    await made.close()


async def converse(client: openai.AsyncOpenAI, run_id: str, rng: random.Random) -> None:
    """Three turns as an agent makes them: plain, streamed, with tools, several choices, unequal temperatures."""
    messages: list[Any] = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": f"What is {rng.randrange(90)} plus {rng.randrange(90)}?"},
    ]
    for turn, temperature in enumerate((1.0, rng.choice([0.5, 1.5]), 1.0)):
        request: dict[str, Any] = {
            "model": "builtin/tiny",
            "messages": messages,
            "temperature": temperature,
            "max_tokens": 12 + 6 * turn,
            "seed": rng.randrange(2**31),
            "tools": [TOOL],
            "extra_headers": {RUN_ID_HEADER: run_id},
        }
        if turn == 1:
            stream = await client.chat.completions.create(**request, stream=True)
            text = "".join([c.choices[0].delta.content or "" async for c in stream if c.choices])
        else:
            reply = await client.chat.completions.create(**request, n=1 + turn)
            text = reply.choices[0].message.content or ""
        messages = [*messages, {"role": "assistant", "content": text}, {"role": "user", "content": "Are you sure?"}]


async def rollouts(policy: Policy, epoch: int) -> list[list[Call]]:
    """Four conversations at once; the recorded calls of each."""
    endpoint = policy.endpoint
    runs = [f"epoch-{epoch}-run-{i}" for i in range(4)]
    for run in runs:
        policy.recorder.open_run(run, "rollout", seed=None)
    async with openai.AsyncOpenAI(api_key=endpoint.api_key, base_url=endpoint.base_url, max_retries=0) as client:
        await asyncio.gather(*(converse(client, run, random.Random(run)) for run in runs))
    return [policy.recorder.close_run(run) for run in runs]


async def train(policy: Policy, runs: list[list[Call]]) -> None:
    """One importance_sampling step on what was recorded."""
    data = [
        chain_datum(chain, 1.0 if i % 2 else -1.0)[0] for i, calls in enumerate(runs) for chain in token_chains(calls)
    ]
    await policy.backend.forward_backward_async(data, loss_fn="importance_sampling")
    await policy.backend.optim_step_async(ADAM)


async def test_recorded_logprobs_are_forwards(policy: Policy, measured: Callable[..., None], tmp_path: Path) -> None:
    for epoch in range(4):
        await train(policy, await rollouts(policy, epoch))
        version = await policy.publish()
    await policy.publish("served")
    calls = [call for run in await rollouts(policy, 9) for call in run]
    assert version == 4  # the number of optimizer steps, which publishing under another name does not change
    assert {call.policy_version for call in calls} == {version}
    # of every run: one call, one streamed call, three choices of a third
    assert len(calls) == 4 * 5

    at_one = [call for call in calls if call.temperature == 1.0]
    data = [chain_datum([call], 1.0)[0] for call in at_one]
    output = await policy.backend.forward_async(data, loss_fn="importance_sampling")
    forward = [
        out["logprobs"].to_torch()[len(call.prompt_ids) - 1 :]
        for call, out in zip(at_one, output.loss_fn_outputs, strict=True)
    ]
    gaps = [float((torch.tensor(c.logprobs) - lp).abs().max()) for c, lp in zip(at_one, forward, strict=True)]
    assert output.metrics["ratio:mean"] == pytest.approx(1.0, abs=TOLERANCE)
    measured(
        "2 sampler and trainer", "recorded calls of the endpoint vs `forward`, after 4 training steps",
        worst=max(gaps), bound=TOLERANCE, calls=len(at_one), tokens=sum(len(c.output_ids) for c in at_one),
    )  # fmt: skip

    base = policy.backend.base.model.config._name_or_path  # type: ignore[attr-defined]
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    bare = [plain_logprobs(plain, call) for call in calls]
    served = PeftModel.from_pretrained(plain, tmp_path / "sampler_weights" / "served")
    want = [plain_logprobs(served, call) for call in calls]
    moved = max(float((a - b).abs().max()) for a, b in zip(bare, want, strict=True))
    assert moved > 0.1, "training must have moved the adapter away from zero"
    gaps = [float((torch.tensor(c.logprobs) - lp).abs().max()) for c, lp in zip(calls, want, strict=True)]
    temperatures = sorted({call.temperature for call in calls})
    assert len(temperatures) == 3
    measured(
        "2 sampler and trainer", "recorded calls vs PEFT's model of the saved adapter, "
        f"T = {', '.join(f'{t:g}' for t in temperatures)}",
        worst=max(gaps), bound=TOLERANCE, calls=len(calls), tokens=sum(len(c.output_ids) for c in calls),
    )  # fmt: skip


def plain_logprobs(model: Any, call: Call) -> torch.Tensor:
    """Logprob of each output id under the tempered distribution, (T,)."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([call.prompt_ids + call.output_ids])).logits[0]
    rows = logits[len(call.prompt_ids) - 1 : -1].double() / call.temperature
    return rows.log_softmax(-1).gather(1, torch.tensor(call.output_ids)[:, None])[:, 0]
