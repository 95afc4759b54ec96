"""Part 3: 20 steps of RL on a small random model raise a fixed reward."""

from __future__ import annotations

import statistics
from dataclasses import replace

import torch
from findings import Findings
from models import build_model, engine_model, tensors_of
from place import Place
from tinker import types

from nat_plugin_evsys.engine.gradient.trainable import TrainableModel
from nat_plugin_evsys.engine.sampler import Sampler
from nat_plugin_evsys.engine.sampling.client import LocalSamplingClient

STEPS, PROMPTS, SAMPLES, TOKENS = 20, 4, 8, 12
VOCAB = 64
LEAST_GAIN = 0.2
ADAM = types.AdamParams(learning_rate=3e-4)
Attempt = tuple[list[int], list[int], list[float], float]
"""Prompt, sampled tokens, their logprobs, reward."""


def run(findings: Findings, place: Place) -> None:
    """Importance sampling with advantages by group; also how far the sampler's logprobs are from the trainer's."""
    shape = replace(place.exact_shape("llama"), vocab=VOCAB)
    # An output head as large as training makes one: with a random one every token is as likely, whatever is learned.
    drawn = tensors_of(build_model(shape))
    weights = {name: tensor * (10 if name == "lm_head.weight" else 1) for name, tensor in drawn.items()}
    dtype = torch.float32 if place.device == "cpu" else torch.bfloat16
    base, adapter = engine_model(shape, place.device, dtype, weights)
    model, sampler = TrainableModel(base, adapter), Sampler(base)
    rewards, divergences = [], [0.0]
    try:
        for step in range(STEPS):
            groups = _rollouts(sampler.client(adapter, step), step)
            data = [datum for group in groups for datum in _as_datums(group)]
            output = model.forward_backward(data, "importance_sampling")
            model.optim_step(ADAM)
            rewards.append(statistics.mean(reward for group in groups for *_, reward in group))
            divergences.append(output.metrics.get("kl_v2:mean", 0.0))  # none where all rewards are the same
            print(f"  step {step}: reward {rewards[-1]:.3f}, KL {divergences[-1]:.1e}", flush=True)
    finally:
        sampler.close()
    first, last = statistics.mean(rewards[:5]), statistics.mean(rewards[-5:])
    findings.figure("reward of the first five steps", first)
    findings.figure("reward of the last five steps", last)
    findings.figure("largest KL of sampler and trainer", max(divergences))
    findings.exact("reward gained, short of 0.2 by", max(0.0, LEAST_GAIN - (last - first)), 0)


def _rollouts(client: LocalSamplingClient, step: int) -> list[list[Attempt]]:
    """The reward is the share of sampled tokens in the lower half of the vocabulary."""
    prompts = [[1 + i, 2 + i, 3 + i] for i in range(PROMPTS)]
    asked = [types.SamplingParams(max_tokens=TOKENS, seed=PROMPTS * step + i, stop=[]) for i in range(PROMPTS)]
    futures = [client.sample(p, SAMPLES, params) for p, params in zip(prompts, asked, strict=True)]
    return [
        [
            (prompt, s.tokens, list(s.logprobs or []), sum(t < VOCAB // 2 for t in s.tokens) / len(s.tokens))
            for s in future.result().sequences
        ]
        for prompt, future in zip(prompts, futures, strict=True)
    ]


def _as_datums(group: list[Attempt]) -> list[types.Datum]:
    mean = statistics.mean(reward for *_, reward in group)
    data = []
    for prompt, tokens, logprobs, reward in group:
        ids, unsampled = prompt + tokens, [0.0] * (len(prompt) - 1)
        inputs = {
            "target_tokens": ids[1:],
            "logprobs": unsampled + logprobs,
            "advantages": unsampled + [reward - mean] * len(tokens),
        }
        data.append(types.Datum(types.ModelInput.from_ints(ids[:-1]), inputs))
    return data
