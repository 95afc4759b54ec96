"""Requests in vLLM's words: everything that decides what is sampled is in them; answers are read or refused."""

from __future__ import annotations

from typing import Any

import pytest
from tinker import types

from nat_plugin_evsys.backends.sampling_params import SamplingParams
from nat_plugin_evsys.backends.vllm.completions import completion_body, sampled, why_not
from nat_plugin_evsys.engine.sampling.request import Limits, SampleRequest
from nat_plugin_evsys.errors import ServiceError

LIMITS = Limits(context_length=32, vocab_size=100, eos=frozenset({2}))


def request(params: types.SamplingParams, num_samples: int = 2, **options: Any) -> SampleRequest:
    return SampleRequest([5, 6, 7], num_samples, params, LIMITS, None, **options)


def choice(index: int, tokens: list[int] | None, logprobs: list[float] | None, reason: str = "stop") -> dict[str, Any]:
    return {"index": index, "token_ids": tokens, "logprobs": {"token_logprobs": logprobs}, "finish_reason": reason}


def test_a_request_says_what_ends_it_and_how_it_is_sampled() -> None:
    asked = types.SamplingParams(max_tokens=100, temperature=0.5, top_k=7, top_p=0.9, stop=[4], seed=11)
    body = completion_body(request(asked), 11, "name")
    expected = {"prompt": [5, 6, 7], "model": "name", "n": 2, "temperature": 0.5, "top_k": 7, "top_p": 0.9, "seed": 11}
    assert expected.items() <= body.items()
    assert body["max_tokens"] == 29, "the room that the context leaves"
    assert (body["stop_token_ids"], body["ignore_eos"]) == ([2, 4], True)
    assert body["return_token_ids"] is True
    assert body["cache_salt"] == "name"
    assert completion_body(request(types.SamplingParams(stop=[])), None, "name")["stop_token_ids"] == []


@pytest.mark.parametrize("top_k", [-1, 7])
def test_a_top_p_of_zero_leaves_the_likeliest_token_alone(top_k: int) -> None:
    body = completion_body(request(types.SamplingParams(top_p=0.0, top_k=top_k)), None, "name")
    assert (body["top_p"], body["top_k"]) == (1.0, 1)


@pytest.mark.parametrize(
    ("params", "options", "reason"),
    [
        (types.SamplingParams(), {}, ""),
        (types.SamplingParams(temperature=0.0, top_k=3, top_p=0.5), {}, ""),
        (types.SamplingParams(), {"prompt_logprobs": True}, "prompt logprobs"),
        (types.SamplingParams(), {"topk_sample": 2}, "top logprobs"),
        (SamplingParams(min_tokens=3), {}, "min_tokens, logit_bias, min_p or a penalty"),
        (SamplingParams(logit_bias={3: -100.0}), {}, "min_tokens, logit_bias, min_p or a penalty"),
    ],
)
def test_what_vllm_would_record_otherwise_is_left_to_the_embedded_engine(
    params: types.SamplingParams, options: dict[str, Any], reason: str
) -> None:
    assert why_not(request(params, **options)) == reason


def test_an_answer_is_read_in_the_order_of_its_sequences() -> None:
    asked = request(types.SamplingParams())
    answer = {
        "choices": [choice(1, [8, 9], [-0.5, -0.25], "length"), choice(0, [2], [-1.5])],
        "usage": {"prompt_tokens_details": {"cached_tokens": 2}},
    }
    result = sampled(answer, asked, policy_version=3)
    assert [(s.tokens, s.logprobs, s.stop_reason) for s in result.sequences] == [
        ([2], [-1.5], "stop"),
        ([8, 9], [-0.5, -0.25], "length"),
    ]
    assert (result.policy_version, result.prompt_cache_hit_tokens) == (3, 2)


def test_greedy_sequences_are_asked_for_once() -> None:
    asked = request(types.SamplingParams(temperature=0.0), num_samples=3)
    assert completion_body(asked, None, "name")["n"] == 1
    result = sampled({"choices": [choice(0, [9, 2], [-0.5, -0.25])]}, asked, policy_version=0)
    assert [s.tokens for s in result.sequences] == [[9, 2]] * 3
    assert len({s.sequence_id for s in result.sequences}) == 3


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ([choice(0, [2], [-1.0])], "1 sequences for 2"),
        ([choice(0, [2], [-1.0]), choice(1, None, [-1.0])], "no token ids"),
        ([choice(0, [2], [-1.0]), choice(1, [3, 4], [-1.0])], "not a logprob of each"),
        ([choice(0, [2], [-1.0]), choice(1, [3], None)], "not a logprob of each"),
    ],
)
def test_an_answer_that_cannot_be_trained_on_is_refused(choices: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ServiceError, match=message):
        sampled({"choices": choices}, request(types.SamplingParams()), policy_version=0)
