"""SamplingClient: Tinker's call and what Loops and Weaver add; sampling beside training."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import tinker
import torch
from samples import assert_greedy, assert_same_samples

from nat_plugin_evsys import SamplingClient, ServiceClient, TrainingClient, types
from nat_plugin_evsys.backends.base import SamplingClient as SamplingProtocol
from nat_plugin_evsys.engine.model.lora import applied

PROMPT = list(range(40, 52))


@pytest.fixture
def sampling(client: TrainingClient, train: Any) -> SamplingClient:
    train(client, 0, 3)
    return client.save_weights_and_get_sampling_client().result()


def logits_of(sampling: SamplingClient, tokens: list[int]) -> torch.Tensor:
    """(len(tokens), V) of one plain forward pass."""
    policy = sampling._engine._policy
    with torch.no_grad(), applied(policy.adapter):
        return sampling._base.model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].float()


def test_it_is_the_backends_sampling_client(sampling: SamplingClient) -> None:
    assert isinstance(sampling, SamplingProtocol)
    assert sampling.policy_version == 3


def test_a_result_reads_as_tinkers_and_as_weavers(sampling: SamplingClient) -> None:
    params = types.SamplingParams(max_tokens=8, seed=1, top_k=0, stop=["\n", "END"], repetition_penalty=1.0)
    future = sampling.sample(
        prompt=types.ModelInput.from_ints(PROMPT), sampling_params=params, num_samples=3, topk_sample_logprobs=2
    )
    result = future.result()
    assert isinstance(result, tinker.SampleResponse)
    assert isinstance(result, types.SampleResult)
    assert future["policy_version"] == result.policy_version == 3
    assert len(future["sequences"]) == 3
    for sequence in result.sequences:
        assert sequence["tokens"] == sequence.tokens
        assert sequence["logprobs"] == sequence.logprobs
        assert sequence["stop_reason"] in ("stop", "length")
        tokenizer = sampling.get_tokenizer()
        assert sequence["text"] == sequence.text == tokenizer.decode(sequence.tokens, skip_special_tokens=True)
        assert len(sequence.topk_logprobs) == len(sequence.tokens)
        with pytest.raises(KeyError):
            sequence["message"]
    assert len({tuple(sequence.tokens) for sequence in result.sequences}) == 3
    again = sampling.sample(PROMPT, 3, params).result()
    assert_same_samples(again.sequences, result.sequences, PROMPT, params, partial(logits_of, sampling))


def test_prompt_logprobs_their_top_k_and_the_last_n(sampling: SamplingClient) -> None:
    whole = sampling.compute_logprobs(prompt=types.ModelInput.from_ints(PROMPT))
    assert whole[0] is None
    assert len(whole) == len(list(whole)) == len(PROMPT)
    expected = logits_of(sampling, PROMPT)[:-1].log_softmax(-1).gather(1, torch.tensor(PROMPT[1:])[:, None])[:, 0]
    assert whole.result()[1:] == pytest.approx(expected.tolist(), abs=1e-5)
    assert str(whole) == str(whole.result())
    params = types.SamplingParams(max_tokens=1)
    full = sampling.sample(PROMPT, 1, params, include_prompt_logprobs=True, topk_prompt_logprobs=3).result()
    assert full.prompt_logprobs == whole.result()
    tail = sampling.sample(PROMPT, 1, params, True, 3, prompt_logprobs_last_n=4).result()
    assert tail.prompt_logprobs[:-4] == [None] * 8
    assert tail.prompt_logprobs[-4:] == full.prompt_logprobs[-4:]
    assert tail.topk_prompt_logprobs[:-4] == [None] * 8
    assert tail.topk_prompt_logprobs[-4:] == full.topk_prompt_logprobs[-4:]
    assert sampling.compute_logprobs(PROMPT, 4).result() == tail.prompt_logprobs
    assert sampling.sample(PROMPT, 1, params).result().prompt_logprobs is None


async def test_async_calls_return_the_result(sampling: SamplingClient) -> None:
    result = await sampling.sample_async(PROMPT, 1, types.SamplingParams(max_tokens=3))
    assert len(result.sequences[0].tokens) <= 3
    assert await sampling.compute_logprobs_async(PROMPT) == sampling.compute_logprobs(PROMPT, wait=True).result()
    assert await sampling.get_base_model_async() == sampling.get_base_model()
    cancelled = asyncio.create_task(sampling.sample(PROMPT, 8, types.SamplingParams(stop=[])).coroutine())
    await asyncio.sleep(0.01)
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("penalty", [1.7, 0.6])
def test_logprobs_under_a_repetition_penalty_are_those_of_the_distribution_sampled(
    sampling: SamplingClient, temperature: float, penalty: float
) -> None:
    """Against transformers' own logits processor, step by step."""
    from transformers import RepetitionPenaltyLogitsProcessor

    params = types.SamplingParams(max_tokens=12, seed=3, stop=[], temperature=temperature, repetition_penalty=penalty)
    plain = types.SamplingParams(max_tokens=12, seed=3, stop=[], temperature=temperature)
    # Beside a request without a penalty, in one batch.
    futures = [sampling.sample(PROMPT, 2, each) for each in (params, plain)]
    penalised, unpenalised = [future.result() for future in futures]
    processor = RepetitionPenaltyLogitsProcessor(penalty)
    for sequence in penalised.sequences:
        tokens = PROMPT + sequence.tokens
        logits = logits_of(sampling, tokens)
        for at, (token, logprob) in enumerate(zip(sequence.tokens, sequence.logprobs, strict=True), len(PROMPT)):
            scores = processor(torch.tensor([tokens[:at]]), logits[None, at - 1].clone())[0]
            expected = (scores / (temperature or 1.0)).log_softmax(-1)
            assert logprob == pytest.approx(expected[token].item(), abs=1e-4)
            if temperature == 0:
                assert_greedy([token], scores[None])
    alone = sampling.sample(PROMPT, 2, plain).result()
    assert_same_samples(alone.sequences, unpenalised.sequences, PROMPT, plain, partial(logits_of, sampling))
    assert [s.tokens for s in alone.sequences] != [s.tokens for s in penalised.sequences]


def test_tinkers_own_params_are_taken_and_drop_what_they_do_not_know(sampling: SamplingClient) -> None:
    theirs = tinker.SamplingParams(max_tokens=4, temperature=0)
    ours = types.SamplingParams(max_tokens=4, temperature=0)
    assert isinstance(ours, tinker.SamplingParams)
    found = [sampling.sample(PROMPT, 1, params)["sequences"] for params in (theirs, ours)]
    assert_same_samples(*found, PROMPT, ours, partial(logits_of, sampling))


def test_sampling_does_not_wait_for_a_training_operation(
    client: TrainingClient, sampling: SamplingClient, service: ServiceClient, datums: Any
) -> None:
    """A training operation is held open; meanwhile clients that exist sample, and saved ones are created."""
    path = client.save_weights_for_sampler("s").result().path
    gate = threading.Event()
    held = client.forward_backward_custom(datums(0), lambda d, lp: (gate.wait(30), (torch.cat(lp).sum(), {}))[1])
    step = client.optim_step(types.AdamParams())
    params = types.SamplingParams(max_tokens=8)
    try:
        assert sampling.sample(PROMPT, 2, params).result(timeout=10).policy_version == 3
        saved = service.create_sampling_client(path).result(timeout=10)
        assert saved.sample(PROMPT, 2, params).result(timeout=10).policy_version == 3
        assert not held.done()
    finally:
        gate.set()
    step.result()
    assert client.policy_version == 4


def test_versions_side_by_side_never_mix(client: TrainingClient, train: Any) -> None:
    """Every sequence's logprobs are those of its own version, though the versions are decoded at once."""
    params = types.SamplingParams(max_tokens=24, stop=[], seed=5)
    samplers, futures = [], []
    for step in range(3):
        samplers.append(client.save_weights_and_get_sampling_client().result())
        futures.append(samplers[-1].sample(PROMPT, 2, params))
        train(client, step, step + 1)
    for version, (sampler, future) in enumerate(zip(samplers, futures, strict=True)):
        result = future.result()
        assert result.policy_version == version
        for sequence in result.sequences:
            logits = logits_of(sampler, PROMPT + sequence.tokens)[len(PROMPT) - 1 : -1]
            expected = logits.log_softmax(-1).gather(1, torch.tensor(sequence.tokens)[:, None])[:, 0]
            np.testing.assert_allclose(sequence.logprobs_np, expected.numpy(), atol=1e-5)


def test_many_threads_share_a_sampling_client(sampling: SamplingClient) -> None:
    params = types.SamplingParams(max_tokens=6, seed=2)
    expected = sampling.sample(PROMPT, 2, params).result()
    found: list[Any] = []
    threads = [
        threading.Thread(target=lambda: found.append(sampling.sample(PROMPT, 2, params).result())) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    for result in found:
        assert_same_samples(result.sequences, expected.sequences, PROMPT, params, partial(logits_of, sampling))


def test_on_tokens_sees_every_token_as_it_comes(sampling: SamplingClient) -> None:
    seen: dict[int, list[int]] = {}

    def collect(index: int, ids: list[int], logprobs: list[float]) -> None:
        seen.setdefault(index, []).extend(ids)

    result = sampling.sample(PROMPT, 2, types.SamplingParams(max_tokens=5), on_tokens=collect, wait=True).result()
    assert seen == dict(enumerate(s.tokens for s in result.sequences))


def test_a_failed_future_prints_as_one(sampling: SamplingClient) -> None:
    future = sampling.sample([], 1, types.SamplingParams())
    assert str(future).startswith("<ResultFuture failed: DataError('the prompt is empty")
    started = time.monotonic()
    with pytest.raises(Exception, match="the prompt is empty"):
        future["sequences"]
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("make", [types.Datum, tinker.Datum])
def test_both_datums_are_trained_on_alike(client: TrainingClient, make: Callable[..., Any]) -> None:
    ids = types.ModelInput.from_ints(PROMPT)
    given: Any = ids if make is types.Datum else PROMPT
    output = client.forward([make(ids, {"target_tokens": given})], "cross_entropy").result()
    assert output.loss == client.forward([tinker.Datum(ids, {"target_tokens": PROMPT})], "cross_entropy").result().loss
