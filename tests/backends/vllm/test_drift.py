"""Drift: its estimate against the exact divergence, and what it is measured on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nat_plugin_evsys.backends.vllm.drift import Drift, Probes, Scored


class Words:
    """A tokenizer of one text."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [len(word) for word in text.split()]


def scored(tokens: list[int], logprobs: list[float], prompt: tuple[int, ...] = (5, 6)) -> Scored:
    return Scored(list(prompt), tokens, logprobs, 1.0)


def test_the_estimate_is_the_divergence_of_the_two_distributions() -> None:
    generator = np.random.default_rng(0)
    sampler, learner = (np.exp(x) / np.exp(x).sum() for x in generator.normal(size=(2, 6)) * 0.3)
    tokens = generator.choice(6, size=200_000, p=sampler).tolist()
    rows = np.concatenate([[0.0], np.log(learner[tokens])])  # one row of the prompt comes first
    drift = Drift.between([scored(tokens, np.log(sampler[tokens]).tolist())], [rows])
    exact = float((sampler * np.log(sampler / learner)).sum())
    assert drift.kl == pytest.approx(exact, rel=0.02)
    assert drift.largest == pytest.approx(float(np.abs(np.log(sampler / learner)).max()))
    assert drift.tokens == 200_000


def test_equal_logprobs_have_no_drift_and_a_bound_holds_for_what_is_no_number() -> None:
    equal = Drift.between([scored([1, 2], [-1.0, -2.0])], [np.array([0.0, -1.0, -2.0])])
    assert (equal.kl, equal.largest, equal.tokens) == (0.0, 0.0, 2)
    assert not equal.exceeds(0.015)
    broken = Drift.between([scored([1], [-1.0])], [np.array([0.0, np.nan])])
    assert broken.exceeds(0.015)
    assert Drift.between([scored([1], [-1.0])], [np.array([0.0, -3.0])]).exceeds(0.015)


def test_a_datum_asks_for_the_sampled_tokens_at_their_temperature() -> None:
    datum = Scored([3, 4, 5], [6, 7], [-0.1, -0.2], 0.7).datum()
    inputs = {name: value.to_torch() for name, value in datum.loss_fn_inputs.items()}
    assert datum.model_input.to_ints() == [3, 4, 5, 6]
    assert inputs["target_tokens"].tolist() == [4, 5, 6, 7]
    assert inputs["weights"].tolist() == [0, 0, 1, 1]
    assert torch.equal(inputs["temperature"], torch.tensor([1, 1, 0.7, 0.7]))


def test_probes_are_the_last_distinct_prompts_at_two_temperatures() -> None:
    probes = Probes(Words(), 1.0)
    for prompt in ([1], [2], [2], [3], [4], [5], list(range(2000))):
        probes.see(prompt)
    found = list(probes)
    assert [prompt[-1] for prompt, _ in found[::2]] == [3, 4, 5, 1999]
    assert max(len(prompt) for prompt, _ in found) == 1024
    assert {temperature for _, temperature in found} == {1.0, 0.7}
    assert Probes(Words(), 0.5).temperatures == (0.5, 1.0)
    assert Probes(Words(), 0.0).temperatures == (1.0, 0.7)
