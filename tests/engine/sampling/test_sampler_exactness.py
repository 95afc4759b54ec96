"""What the sampler reports equals plain forward passes, for every family, with an adapter that is not zero."""

import random
from functools import partial

import numpy as np
import pytest
import torch
from samples import assert_likeliest, assert_same_samples
from tinker.types import ModelInput, SamplingParams

from nat_plugin_evsys.engine.sampling.row_decoder import Context
from nat_plugin_evsys.engine.sampling.slot_decoder import SlotDecoder
from nat_plugin_evsys.engine.spans.decoder import SpanDecoder

WINDOWED = ["qwen3_window", "mistral", "gemma2", "gemma3"]
FAMILIES = ["qwen3", "qwen2", "llama", "qwen3_moe", "mixtral", *WINDOWED]
TIMEOUT = 60


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(1, 300), k=length)


def reference(logits: torch.Tensor, prompt: list[int], tokens: list[int], temperature: float) -> torch.Tensor:
    """Logprob of each token of ``tokens`` under the tempered full distribution, float64."""
    rows = logits[len(prompt) - 1 : len(prompt) + len(tokens) - 1].double() / temperature
    return rows.log_softmax(-1).gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1)


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_equal_a_plain_forward(family, make_base, make_adapter, make_sampler, plain_logits):
    base = make_base(family)
    adapter = make_adapter(base)
    client = make_sampler(base).client(adapter, 3)
    futures = []
    for i, (length, temperature) in enumerate([(3, 0.5), (21, 1.0), (13, 1.5), (21, 0.5), (5, 1.5), (40, 1.0)]):
        prompt = prompt_of(length, seed=length)
        params = SamplingParams(max_tokens=12 + 5 * i, temperature=temperature, seed=i, stop=[])
        futures.append((prompt, temperature, client.sample(ModelInput.from_ints(prompt), 2, params)))
    moved = 0.0
    for prompt, temperature, future in futures:
        result = future.result(TIMEOUT)
        assert result.policy_version == 3
        for sequence in result.sequences:
            ids = prompt + sequence.tokens
            want = reference(plain_logits(base, adapter, ids), prompt, sequence.tokens, temperature)
            delta = (torch.tensor(sequence.logprobs, dtype=torch.float64) - want).abs().max()
            assert delta <= 1e-5
            bare = reference(plain_logits(base, None, ids), prompt, sequence.tokens, temperature)
            moved = max(moved, float((bare - want).abs().max()))
    assert moved > 0.1  # the adapter matters, so the comparison could have failed


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "mistral", "mixtral"])
def test_prompt_logprobs_equal_a_plain_forward(family, make_base, make_adapter, make_sampler, plain_logits):
    base = make_base(family)
    adapter = make_adapter(base)
    client = make_sampler(base).client(adapter, 0)
    prompts = [prompt_of(n, seed=n) for n in (1, 2, 17, 33, 96)]
    futures = [client.compute_logprobs(ModelInput.from_ints(p)) for p in prompts]
    for prompt, future in zip(prompts, futures, strict=True):
        got = future.result(TIMEOUT)
        assert got[0] is None
        assert len(got) == len(prompt)
        if len(prompt) > 1:
            want = reference(plain_logits(base, adapter, prompt), prompt[:1], prompt[1:], 1.0)
            assert np.abs(np.array(got[1:]) - want.numpy()).max() <= 1e-5


def test_sampling_with_prompt_logprobs_and_topk(base, adapter, make_sampler, plain_logits):
    client = make_sampler(base).client(adapter, 0)
    prompt = prompt_of(23)
    result = client.sample(
        ModelInput.from_ints(prompt), 2, SamplingParams(max_tokens=6, temperature=0.7, seed=1, stop=[]), True, 3,
        topk_sample_logprobs=4,
    ).result(TIMEOUT)  # fmt: skip
    logits = plain_logits(base, adapter, prompt)
    assert np.isnan(result.prompt_logprobs_np[0])
    assert result.prompt_logprobs[0] is None
    want = reference(logits, prompt[:1], prompt[1:], 1.0).numpy()  # temperature 1, whatever is sampled with
    assert np.abs(result.prompt_logprobs_np[1:] - want).max() <= 1e-5
    assert result.topk_prompt_logprobs[0] is None
    for entries, row in zip(result.topk_prompt_logprobs[1:], logits[:-1].log_softmax(-1), strict=True):
        assert len(entries) == 3
        assert_likeliest(entries, row)
    for sequence in result.sequences:
        full = plain_logits(base, adapter, prompt + sequence.tokens)
        for t, entries in enumerate(sequence.topk_logprobs):
            assert len(entries) == 4
            assert_likeliest(entries, (full[len(prompt) - 1 + t] / 0.7).log_softmax(-1))


def test_results_without_options_have_none(base, make_sampler):
    result = make_sampler(base).client(None, 0).sample(ModelInput.from_ints([1, 2]), 1, SamplingParams(max_tokens=2))
    sample = result.result(TIMEOUT)
    assert sample.prompt_logprobs is None
    assert sample.topk_prompt_logprobs is None
    assert sample.sequences[0].topk_logprobs is None


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "qwen3_moe"])
def test_ragged_concurrent_requests_equal_one_at_a_time(family, make_base, make_adapter, make_sampler, plain_logits):
    base = make_base(family)
    adapter = make_adapter(base)
    requests = [
        (
            prompt_of(3 + 7 * (i % 6), seed=i),
            1 + i % 3,
            SamplingParams(max_tokens=3 + 4 * i % 29, seed=i, temperature=1.2),
        )
        for i in range(14)
    ]
    together = make_sampler(base, max_batch_size=9).client(adapter, 0)
    futures = [together.sample(ModelInput.from_ints(p), n, params) for p, n, params in requests]
    alone = make_sampler(base, max_batch_size=1, prefix_cache_bytes=0).client(adapter, 0)
    for (prompt, n, params), future in zip(requests, futures, strict=True):
        one = alone.sample(ModelInput.from_ints(prompt), n, params).result(TIMEOUT)
        many = future.result(TIMEOUT)
        assert_same_samples(many.sequences, one.sequences, prompt, params, partial(plain_logits, base, adapter))


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_prompts_fed_in_pieces_equal_prompts_fed_whole(family, make_base, make_adapter, make_sampler, plain_logits):
    base = make_base(family)
    adapter = make_adapter(base)
    prompts = [prompt_of(n, seed=n) for n in (61, 45, 9, 70)]
    params = SamplingParams(max_tokens=8, seed=5, stop=[])
    whole = make_sampler(base).client(adapter, 0)
    small = make_sampler(base)
    small._runner.prefill_tokens = 16
    pieces = small.client(adapter, 0)
    for prompt in prompts:
        a = whole.sample(ModelInput.from_ints(prompt), 1, params, True).result(TIMEOUT)
        b = pieces.sample(ModelInput.from_ints(prompt), 1, params, True).result(TIMEOUT)
        assert_same_samples(a.sequences, b.sequences, prompt, params, partial(plain_logits, base, adapter))
        assert np.allclose(a.prompt_logprobs_np, b.prompt_logprobs_np, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("path", ["auto", "plain"])
def test_policies_that_are_decoded_together_share_one_kv_memory(path, base, make_adapter, make_sampler):
    sampler = make_sampler(base, path=path)
    sampler._kv.max_bytes = sampler._runner.layout.bytes_per_token * 64 * 40
    held = []

    def look(*_):
        stores = {id(each.decoder): each.decoder.kv_bytes for each in list(sampler._batches.values())}
        held.append((len(stores), sampler._spans.held_bytes + sum(stores.values())))

    params = SamplingParams(max_tokens=20, seed=2, stop=[])
    clients = [sampler.client(make_adapter(base, seed), seed) for seed in range(3)]
    futures = [client.sample(ModelInput.from_ints(prompt_of(40)), 16, params, on_tokens=look) for client in clients]
    for future in futures:
        assert [len(each.tokens) for each in future.result(TIMEOUT).sequences] == [20] * 16
    assert max(held)[0] == 3
    assert sampler._kv.max_bytes / 2 < max(taken for _, taken in held) <= sampler._kv.max_bytes


def test_a_store_grows_only_where_both_the_old_and_the_new_one_fit(base, make_sampler):
    sampler = make_sampler(base, path="plain")
    decoder = sampler._decoder(sampler._policies.new(None, 0))
    each = sampler._runner.layout.bytes_per_token
    decoder.store.reserve(8, 64)
    assert decoder.kv_bytes == 8 * 64 * each
    for room, fits in ((8 + 15, False), (8 + 16, True)):
        sampler._kv.max_bytes = room * 64 * each
        assert decoder.fits([Context(prompt_of(40), 16)]) == fits
    assert decoder.fits([Context(prompt_of(40), 8)])


@pytest.mark.parametrize("path", ["auto", "plain"])
def test_running_out_of_kv_memory_changes_nothing(path, base, adapter, make_sampler, plain_logits, monkeypatch):
    sent_back = []
    for decoder in (SpanDecoder, SlotDecoder):
        fits = decoder.fits

        def spied(self, new, fits=fits):
            sent_back.append(not new and not fits(self, new))
            return fits(self, new)

        monkeypatch.setattr(decoder, "fits", spied)
    prompts = [prompt_of(n, seed=n) for n in (20, 30, 7, 41)]
    params = SamplingParams(max_tokens=50, seed=2, stop=[])
    plenty, tight = make_sampler(base, path=path), make_sampler(base, path=path)
    clients = [plenty.client(adapter, 0), tight.client(adapter, 0)]
    # room for all rows when they join, but not when they are longer
    tight._kv.max_bytes = tight._runner.layout.bytes_per_token * 64 * 6
    futures = [(client.sample(ModelInput.from_ints(p), 2, params)) for p in prompts for client in clients]
    results = [future.result(TIMEOUT) for future in futures]
    for prompt, a, b in zip(prompts, results[::2], results[1::2], strict=True):
        assert_same_samples(a.sequences, b.sequences, prompt, params, partial(plain_logits, base, adapter))
        assert len(a.sequences[0].tokens) == 50
    assert any(sent_back)  # rows did go back to waiting


def test_bfloat16_agrees_within_its_precision(make_adapter, make_sampler, plain_logits, tokenizer, make_base):
    import copy

    from nat_plugin_evsys.engine.model.loading import wrap_model

    base = wrap_model("bf16", copy.deepcopy(make_base("gemma3").model).to(torch.bfloat16), tokenizer)
    adapter = make_adapter(base).snapshot(torch.bfloat16)
    prompt = prompt_of(15)
    client = make_sampler(base).client(adapter, 0)
    result = client.sample(ModelInput.from_ints(prompt), 3, SamplingParams(max_tokens=30, seed=1, stop=[]))
    for sequence in result.result(TIMEOUT).sequences:
        want = reference(plain_logits(base, adapter, prompt + sequence.tokens), prompt, sequence.tokens, 1.0)
        assert (torch.tensor(sequence.logprobs) - want).abs().mean() < 0.05
