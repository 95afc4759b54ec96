"""Penalties, biases, min_p, min_tokens and bans: one batch of many requests, against a plain loop over each row."""

import math
from typing import Any

import pytest
import torch
from tinker.types import ModelInput

from nat_plugin_evsys.engine.sampling.request import Limits, SampleRequest
from nat_plugin_evsys.engine.sampling.row_sampler import row_params, sample_rows
from nat_plugin_evsys.errors import DataError
from nat_plugin_evsys.runtime.extensions import SamplingParams

TIMEOUT = 60
PROMPT = [5, 6, 7, 8, 5]
ENDS = [0, 40, 41]  # the tokenizer's EOS and two more
BAN = {token: -100.0 for token in range(50, 300)}
GRAMMAR = 'start: ("a" | "b" | "c"){1,3}'

REQUESTS: dict[str, dict[str, Any]] = {
    "free": {},
    "repetition": {"repetition_penalty": 1.8},
    "repetition of the likely": {"repetition_penalty": 0.5, "temperature": 0.7},
    "frequency": {"frequency_penalty": 1.5, "temperature": 0},
    "presence": {"presence_penalty": -2.0},
    "all penalties": {"repetition_penalty": 1.3, "frequency_penalty": 0.7, "presence_penalty": 0.4, "min_p": 0.02},
    "bias": {"logit_bias": {3: 6.0, 250: 7.5, 9: -3.0}, "temperature": 1.4},
    "bias and all": {"logit_bias": {3: 6.0, 7: 2.0, 9: -100.0}, "repetition_penalty": 1.3, "frequency_penalty": 0.7},
    "min_p": {"min_p": 0.3, "temperature": 1.5},
    "min_p and top_k": {"min_p": 0.05, "top_k": 7, "top_p": 0.9},
    "greedy and min_p": {"min_p": 0.9, "temperature": 0},
    "bans": {"logit_bias": BAN, "temperature": 0.8},
    "min_tokens": {"min_tokens": 9, "logit_bias": BAN, "stop": ENDS},
    "min_tokens, penalties": {"min_tokens": 9, "presence_penalty": 1.0, "top_k": 20, "stop": ENDS},
}
RULED_OUT = {"bias and all", "bans", "min_tokens", "min_tokens, penalties"}


def drawn_from(logits: torch.Tensor, sampled: list[int], params: SamplingParams) -> list[float]:
    """Log-probabilities of all tokens, by vLLM's steps, token by token."""
    z = logits.tolist()
    bias = params.logit_bias or {}
    for token in range(len(z)):
        if bias.get(token, 0.0) <= -100 or (len(sampled) < params.min_tokens and token in ENDS):
            z[token] = -math.inf
        z[token] += bias.get(token, 0.0)
        if token in PROMPT or token in sampled:
            z[token] = z[token] / params.repetition_penalty if z[token] > 0 else z[token] * params.repetition_penalty
        z[token] -= params.frequency_penalty * sampled.count(token) + params.presence_penalty * (token in sampled)
    if params.temperature == 0:
        return torch.tensor(z).log_softmax(-1).tolist()
    probs = (torch.tensor(z).double() / params.temperature).softmax(-1).tolist()
    kept = [token for token, p in enumerate(probs) if p >= params.min_p * max(probs) and p > 0]
    kept.sort(key=lambda token: -probs[token])
    kept = kept[: params.top_k] if params.top_k > 0 else kept
    total, nucleus = 0.0, []
    for token in kept:
        if total < params.top_p * sum(probs[each] for each in kept):
            nucleus.append(token)
        total += probs[token]
    whole = sum(probs[token] for token in nucleus)
    return [math.log(probs[token] / whole) if token in nucleus else -math.inf for token in range(len(z))]


@pytest.mark.parametrize("options", [{}, {"path": "plain", "kv_cache_bytes": 40_000}], ids=["fast", "plain and small"])
def test_each_row_is_sampled_from_its_own_distribution(options, base, adapter, make_sampler, plain_logits):
    client = make_sampler(base, **options).client(adapter, 1)
    asked = {
        name: SamplingParams(**{"max_tokens": 12, "seed": 3, "stop": [], **fields}) for name, fields in REQUESTS.items()
    }
    futures = {
        name: client.sample(ModelInput.from_ints(PROMPT), 1, params, topk_sample_logprobs=300)
        for name, params in asked.items()
    }
    for name, params in asked.items():
        for sequence in futures[name].result(TIMEOUT).sequences:
            logits = plain_logits(base, adapter, [*PROMPT, *sequence.tokens])[len(PROMPT) - 1 : -1]
            for at, (token, logprob) in enumerate(zip(sequence.tokens, sequence.logprobs, strict=True)):
                want = drawn_from(logits[at], sequence.tokens[:at], params)
                assert want[token] > -math.inf, (name, at)
                if params.temperature == 0:
                    assert want[token] == pytest.approx(max(want), abs=1e-4)
                if name in RULED_OUT:  # the policy's own
                    want = (logits[at] / params.temperature).log_softmax(-1).tolist()
                assert logprob == pytest.approx(want[token], abs=1e-4), (name, at)
                told = dict(sequence.topk_logprobs[at])
                assert told[token] == pytest.approx(logprob, abs=1e-6)
                likeliest = max(range(300), key=want.__getitem__)
                assert max(told.values()) == pytest.approx(want[likeliest], abs=1e-4)
            if params.min_tokens:
                assert len(sequence.tokens) >= params.min_tokens


def test_a_form_ends_where_it_must_and_bans_may_not_break_it(base, adapter, make_sampler, tokenizer):
    client = make_sampler(base).client(adapter, 1)
    constraint = client.grammars.compile(GRAMMAR, [0])
    prompt = ModelInput.from_ints([*PROMPT, *constraint.prefix])

    def ask(**fields: Any) -> Any:
        params = SamplingParams(**{"max_tokens": 9, "seed": 1, **fields})
        return client.sample(prompt, 4, params, constraint=constraint).result(TIMEOUT).sequences

    a, b, c = (tokenizer.encode(letter)[0] for letter in "abc")
    texts = [tokenizer.decode(sequence.tokens[:-1]) for sequence in ask(min_tokens=9, logit_bias={a: -100, b: -100})]
    assert texts == ["ccc"] * 4
    with pytest.raises(DataError, match="bans every token that the form"):
        ask(logit_bias={a: -100, b: -100, c: -100})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"min_p": 1.5}, "min_p must lie between"),
        ({"min_tokens": 5, "max_tokens": 4}, "got 5 of at most 4"),
        ({"min_tokens": 2, "stop": ["x"]}, "no stop strings"),
        ({"frequency_penalty": math.nan}, "frequency_penalty must be a number"),
        ({"repetition_penalty": -1.0}, "repetition_penalty must be a positive number"),
        ({"repetition_penalty": 1e39}, "repetition_penalty must be .* up to 1e\\+20, got 1e\\+39"),
        ({"presence_penalty": -1e39}, "presence_penalty must be .* up to 1e\\+20, got -1e\\+39"),
        ({"logit_bias": {300: 1.0}}, "outside the vocabulary of 300"),
        ({"logit_bias": {3: 101.0}}, "between -100 .* got 101"),
        ({"logit_bias": dict.fromkeys(range(300), -100.0)}, "bans every token"),
        ({"logit_bias": dict.fromkeys(range(1, 300), -100.0), "min_tokens": 2}, "min_tokens is 2, .* does not end the"),
    ],
)
def test_what_is_out_of_range_is_named(fields, words, base, make_sampler):
    future = make_sampler(base).client(None, 1).sample(ModelInput.from_ints(PROMPT), 1, SamplingParams(**fields))
    with pytest.raises(DataError, match=words):
        future.result(TIMEOUT)


def test_a_banned_token_is_not_sampled_in_the_place_of_one_that_cannot_be():
    bias = {token: -100.0 for token in range(12) if token != 4}
    params = SamplingParams(max_tokens=3, logit_bias=bias, seed=1)
    request = SampleRequest(PROMPT, 1, params, Limits(99, 12, frozenset()), None)
    logits = torch.zeros(1, 12)
    logits[0, 4] = -math.inf
    [(_, logprob)] = sample_rows(request.sequences, logits, row_params(request.sequences, 12, logits.device))
    assert math.isnan(logprob)


def test_the_largest_penalties_give_numbers(base, make_sampler):
    client = make_sampler(base).client(None, 1)
    largest = {"frequency_penalty": 1e20, "presence_penalty": -1e20, "repetition_penalty": 1e20}
    for penalties in (largest, {name: 1 / value if value == 1e20 else -value for name, value in largest.items()}):
        params = SamplingParams(max_tokens=30, temperature=1e-6, seed=1, stop=[], **penalties)
        sequence = client.sample(ModelInput.from_ints(PROMPT), 1, params).result(TIMEOUT).sequences[0]
        assert len(sequence.tokens) == 30
