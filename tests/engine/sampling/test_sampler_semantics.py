"""Seeds, stops, lengths and errors, as a client sees them."""

import random
from functools import partial

import numpy as np
import pytest
import torch
from samples import ROUNDING, assert_greedy, assert_likeliest, assert_same_samples
from tinker import types
from tinker.types import ModelInput, SamplingParams

from nat_plugin_evsys.backends.base import SamplingClient
from nat_plugin_evsys.engine.sampling.stopping import StopTextMatcher
from nat_plugin_evsys.errors import DataError, EngineClosedError, PromptTooLongError

TIMEOUT = 60
PROMPT = ModelInput.from_ints([5, 6, 7, 8])


@pytest.fixture
def client(base, adapter, make_sampler):
    return make_sampler(base).client(adapter, 1)


def tokens(client, n=1, prompt=PROMPT, **params):
    params = {"max_tokens": 12, "stop": [], **params}
    return [s.tokens for s in client.sample(prompt, n, SamplingParams(**params)).result(TIMEOUT).sequences]


def test_client_fits_the_protocol(client):
    assert isinstance(client, SamplingClient)


def test_same_seed_same_set_and_samples_differ(client, base, adapter, plain_logits):
    params = SamplingParams(max_tokens=12, stop=[], seed=4)
    first, again, fewer = (client.sample(PROMPT, n, params).result(TIMEOUT).sequences for n in (6, 6, 2))
    assert len({tuple(s.tokens) for s in first}) == 6
    logits_of = partial(plain_logits, base, adapter)
    assert_same_samples(first, again, PROMPT.to_ints(), params, logits_of)
    assert_same_samples(first[:2], fewer, PROMPT.to_ints(), params, logits_of)
    other = client.sample(PROMPT, 6, SamplingParams(max_tokens=12, stop=[], seed=5)).result(TIMEOUT).sequences
    with pytest.raises(AssertionError, match="from the border"):
        assert_same_samples(first, other, PROMPT.to_ints(), params, logits_of)


def test_no_seed_means_fresh_randomness(client):
    assert tokens(client, 3) != tokens(client, 3)


def test_top_k_one_and_greedy_agree_and_report_their_logprobs(client, base, adapter, plain_logits):
    params = SamplingParams(max_tokens=10, temperature=0, stop=[])
    only = client.sample(PROMPT, 1, SamplingParams(max_tokens=10, top_k=1, stop=[])).result(TIMEOUT).sequences[0]
    assert np.abs(only.logprobs).max() == 0  # renormalised over the one token left
    greedy = client.sample(PROMPT, 2, params).result(TIMEOUT).sequences
    for tokens in (greedy[0].tokens, greedy[1].tokens, only.tokens):
        rows = plain_logits(base, adapter, PROMPT.to_ints() + tokens)[3:-1].log_softmax(-1)
        assert_greedy(tokens, rows)
    rows = plain_logits(base, adapter, PROMPT.to_ints() + greedy[0].tokens)[3:-1].log_softmax(-1)
    assert np.allclose(greedy[0].logprobs, rows.max(-1).values, atol=1e-5)


def test_top_p_logprobs_are_renormalised(client, base, adapter, plain_logits):
    result = client.sample(
        PROMPT, 4, SamplingParams(max_tokens=15, top_p=0.6, temperature=1.2, seed=3, stop=[]), topk_sample_logprobs=300
    ).result(TIMEOUT)
    for sequence in result.sequences:
        logits = plain_logits(base, adapter, PROMPT.to_ints() + sequence.tokens)[3:-1] / 1.2
        for row, token, logprob, entries in zip(
            logits.double().softmax(-1), sequence.tokens, sequence.logprobs, sequence.topk_logprobs, strict=True
        ):
            kept = [t for t, _ in entries]
            mass = row[kept].sum()
            assert token in kept
            assert_likeliest(entries, (row / mass).log())
            # The smallest set that reaches top_p: with the last token, not without it.
            assert mass >= 0.6 - ROUNDING
            assert mass - row[kept[-1]] < 0.6 + ROUNDING
            assert logprob == pytest.approx(float((row[token] / mass).log()), abs=1e-5)
            assert sum(np.exp(lp) for _, lp in entries) == pytest.approx(1, abs=1e-5)


def test_samples_follow_the_model(client, base, adapter, plain_logits):
    """First tokens of 4,000 samples against the model's own probabilities (chi-square, fixed seed)."""
    n = 4000
    drawn = [t[0] for t in tokens(client, n, max_tokens=1, seed=11, top_k=8)]
    probs = plain_logits(base, adapter, PROMPT.to_ints())[-1].double().softmax(-1)
    top, ids = probs.topk(8)
    expected = (top / top.sum() * n).numpy()
    counts = np.array([drawn.count(i) for i in ids.tolist()])
    assert counts.sum() == n
    assert ((counts - expected) ** 2 / expected).sum() < 40


def test_length_and_stop_ids(make_reciting, make_sampler):
    free, at = [*range(20, 50), PROMPT.to_ints()[-1]], 7
    client = make_sampler(make_reciting([free[-1], *free[:-1]])).client(None, 1)
    assert tokens(client, seed=8, max_tokens=31) == [free]
    result = client.sample(PROMPT, 1, SamplingParams(max_tokens=30, seed=8, stop=[free[at]])).result(TIMEOUT)
    sequence = result.sequences[0]
    assert sequence.tokens == free[: at + 1]
    assert len(sequence.logprobs) == at + 1
    assert sequence.stop_reason == "stop"
    short = client.sample(PROMPT, 1, SamplingParams(max_tokens=at, seed=8, stop=[free[at]])).result(TIMEOUT)
    assert short.sequences[0].stop_reason == "length"
    assert short.sequences[0].tokens == free[:at]


def test_eos_stops_by_default_and_with_other_stops_but_not_with_an_empty_list(make_reciting, make_sampler, tokenizer):
    cut = [*range(20, 35), tokenizer.eos_token_id]
    last, unused = PROMPT.to_ints()[-1], 40
    client = make_sampler(make_reciting([last, *cut])).client(None, 1)
    assert tokens(client, max_tokens=40) == [[*cut, last, *cut, last, *cut][:40]]
    for stop in (None, [unused], ["no such text in it"]):
        result = client.sample(PROMPT, 1, SamplingParams(max_tokens=40, stop=stop)).result(TIMEOUT)
        assert result.sequences[0].tokens == cut
        assert result.sequences[0].stop_reason == "stop"


@pytest.mark.parametrize("stop", ["p sign", "sign", "stops a", "no such text in it"])
def test_stop_string_across_tokens(stop, make_reciting, make_sampler, tokenizer):
    """The sampler stops at the first token that completes the text, wherever in a token it begins and ends."""
    free = tokenizer.encode("a fox stops at the lazy dog and his stop sign")
    decode, last = tokenizer.decode, PROMPT.to_ints()[-1]
    assert len([t for t in free if len(decode([t])) > 1]) > 5
    client = make_sampler(make_reciting([last, *free])).client(None, 1)
    first = next((i for i in range(1, len(free) + 1) if stop in decode(free[:i])), len(free))
    params = SamplingParams(max_tokens=len(free), seed=21, stop=stop)
    sequence = client.sample(PROMPT, 1, params).result(TIMEOUT).sequences[0]
    assert sequence.tokens == free[:first]
    assert sequence.stop_reason == ("length" if stop.startswith("no") else "stop")
    assert sequence.text == decode(free[:first], skip_special_tokens=True)


@pytest.mark.parametrize("text", ["and the stop sign, then more", "naïve café 日本語 STOP 🙂🙃 end", "🙂🙂🙂STOP"])
@pytest.mark.parametrize("stop", ["stop sign", "é 日", "🙂🙃", "STOP", "🙂STOP", "absent"])
def test_matcher_fires_at_the_first_token_that_completes_the_string(tokenizer, text, stop):
    ids = tokenizer.encode(text)
    for prompt in ([1], tokenizer.encode("the 日本")[:-1]):  # the second prompt ends inside a character
        matcher = StopTextMatcher(tokenizer, (stop,), prompt)
        fired = next((i for i, token in enumerate(ids, 1) if matcher.push(token)), None)
        want = next((i for i in range(1, len(ids) + 1) if stop in tokenizer.decode(ids[:i])), None)
        assert fired == want


def test_matcher_on_random_bytes_equals_searching_the_whole_text(tokenizer):
    """Random tokens are mostly broken UTF-8; what matters is that nothing valid is missed between it."""
    rng = random.Random(0)
    for _ in range(60):
        ids = rng.choices(range(1, 257), k=60) + tokenizer.encode("x🙂stop!") + rng.choices(range(1, 257), k=5)
        matcher = StopTextMatcher(tokenizer, ("🙂stop",), [4])
        fired = next((i for i, token in enumerate(ids, 1) if matcher.push(token)), None)
        assert fired == next(i for i in range(1, len(ids) + 1) if "🙂stop" in tokenizer.decode(ids[:i]))


def test_max_tokens_none_fills_the_context_and_too_many_are_cut(client, base):
    room = base.context_length - 4
    for max_tokens in (None, room + 50):
        result = client.sample(PROMPT, 1, SamplingParams(max_tokens=max_tokens, seed=1, stop=[])).result(TIMEOUT)
        assert len(result.sequences[0].tokens) == room
        assert result.sequences[0].stop_reason == "length"
    nearly = ModelInput.from_ints([3] * (base.context_length - 1))
    assert len(tokens(client, prompt=nearly, max_tokens=5)[0]) == 1


IMAGE = ModelInput(chunks=[types.ImageChunk(data=b"x", format="png", expected_tokens=1)])
BAD = [
    (dict(prompt=ModelInput.empty()), DataError, "prompt is empty"),
    (
        dict(prompt=ModelInput.from_ints([1, 300])),
        DataError,
        "token 300 at position 1 is outside the vocabulary of 300",
    ),
    (dict(prompt=ModelInput.from_ints([-1])), DataError, "token -1 at position 0"),
    (dict(prompt=IMAGE), DataError, "ImageChunk"),
    (dict(prompt=ModelInput.from_ints([1] * 96)), PromptTooLongError, "96 tokens and 7 more .* context length is 96"),
    (dict(num_samples=0), DataError, "num_samples must be at least 1, got 0"),
    (dict(temperature=-0.1), DataError, "temperature must be 0 .* got -0.1"),
    (dict(temperature=float("nan")), DataError, "temperature"),
    (dict(top_p=1.5), DataError, "top_p must lie between 0 and 1, got 1.5"),
    (dict(top_k=-2), DataError, "top_k must be .* got -2"),
    (dict(max_tokens=0), DataError, "max_tokens must be positive or None, got 0"),
    (dict(stop=""), DataError, "empty string"),
    (dict(stop=["a", ""]), DataError, "empty string"),
    (dict(stop=[300]), DataError, "stop token id 300 is outside"),
    (dict(topk_prompt_logprobs=-1), DataError, "topk_prompt_logprobs must lie between 0"),
    (dict(topk_sample_logprobs=301), DataError, "topk_sample_logprobs must lie between 0 .* 300, got 301"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_requests_are_refused_and_the_next_is_served(client, change, error, message):
    change = dict(change)
    prompt, n = change.pop("prompt", PROMPT), change.pop("num_samples", 1)
    extra = {k: change.pop(k) for k in list(change) if k.startswith("topk_")}
    with pytest.raises(error, match=message):
        client.sample(prompt, n, SamplingParams(**{"max_tokens": 7, **change}), **extra).result(TIMEOUT)
    assert len(tokens(client)[0]) == 12


async def test_async_calls_raise_the_same(client):
    with pytest.raises(PromptTooLongError) as caught:
        await client.sample_async(ModelInput.from_ints([1] * 97), 1, SamplingParams(max_tokens=3))
    assert (caught.value.prompt_tokens, caught.value.max_tokens, caught.value.context_length) == (97, 3, 96)
    with pytest.raises(PromptTooLongError):
        await client.compute_logprobs_async(ModelInput.from_ints([1] * 97))
    assert len(await client.compute_logprobs_async(ModelInput.from_ints([1] * 96))) == 96


def test_closed_sampler_refuses(base, make_sampler):
    sampler = make_sampler(base)
    client = sampler.client(None, 0)
    sampler.close()
    sampler.close()
    with pytest.raises(EngineClosedError):
        client.sample(PROMPT, 1, SamplingParams(max_tokens=1)).result(TIMEOUT)


def test_a_trainable_adapter_is_frozen_by_its_client(base, make_sampler, plain_logits):
    from nat_plugin_evsys.engine.model.lora import LoraAdapter

    live = LoraAdapter.create(base.model, rank=2, alpha=4)
    client = make_sampler(base).client(live, 0)
    with torch.no_grad():
        for _, b in live.weights.values():
            b.fill_(0.3)
    got = client.compute_logprobs(PROMPT).result(TIMEOUT)[1:]
    bare = plain_logits(base, None, PROMPT.to_ints())[:-1].log_softmax(-1)
    assert np.allclose(got, bare.gather(1, torch.tensor(PROMPT.to_ints()[1:]).unsqueeze(1)).squeeze(1), atol=1e-5)
