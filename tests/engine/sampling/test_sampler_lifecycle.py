"""Continuous batching: cancelling, streaming, failures, versions side by side, and kept prefixes."""

import asyncio
import re
import threading
import time
from functools import partial

import numpy as np
import pytest
import torch
from hold import Hold
from samples import assert_same_samples
from tinker.types import ModelInput, SamplingParams

from nat_plugin_evsys.errors import EngineClosedError, ModelError

TIMEOUT = 60
PROMPT = ModelInput.from_ints([9, 8, 7])
LONG = SamplingParams(max_tokens=90, stop=[], seed=1)


SHORT = SamplingParams(max_tokens=5, seed=0, stop=[])


def short(client):
    return client.sample(PROMPT, 1, SHORT)


def wait_idle(sampler):
    deadline = time.monotonic() + 10
    while sampler._batches and time.monotonic() < deadline:
        time.sleep(0.005)
    assert not sampler._batches


async def test_cancelling_the_task_frees_the_rows(base, adapter, make_sampler):
    sampler = make_sampler(base, max_batch_size=2)
    client = sampler.client(adapter, 0)
    seen, enough, loop = [], asyncio.Event(), asyncio.get_running_loop()

    def on_tokens(index, ids, logprobs):
        seen.extend(ids)
        if len(seen) == 6:
            loop.call_soon_threadsafe(enough.set)
        time.sleep(0.01)

    task = asyncio.create_task(client.sample_async(PROMPT, 2, LONG, on_tokens=on_tokens))
    waiting = asyncio.create_task(client.sample_async(PROMPT, 1, SamplingParams(max_tokens=5, stop=[])))
    await asyncio.wait_for(enough.wait(), TIMEOUT)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len((await asyncio.wait_for(waiting, TIMEOUT)).sequences[0].tokens) == 5  # it had to wait for the rows
    assert len(seen) < 100
    wait_idle(sampler)


def test_cancelling_a_future_ends_the_request_at_the_next_step(base, make_sampler):
    sampler = make_sampler(base)
    client = sampler.client(None, 0)
    started = threading.Event()
    future = client.sample(PROMPT, 3, LONG, on_tokens=lambda *_: started.set() or time.sleep(0.005))
    assert started.wait(TIMEOUT)
    assert future.cancel()
    wait_idle(sampler)
    assert len(short(client).result(TIMEOUT).sequences[0].tokens) == 5


def test_streaming_gives_every_token_of_every_sample_in_order(base, adapter, make_sampler):
    got = {0: ([], []), 1: ([], []), 2: ([], [])}

    def on_tokens(index, ids, logprobs):
        got[index][0].extend(ids)
        got[index][1].extend(logprobs)

    result = make_sampler(base).client(adapter, 0).sample(PROMPT, 3, LONG, on_tokens=on_tokens).result(TIMEOUT)
    for i, sequence in enumerate(result.sequences):
        assert got[i][0] == sequence.tokens
        assert np.allclose(got[i][1], sequence.logprobs)
    assert len({s.sequence_id for s in result.sequences}) == 3


def test_a_failing_callback_fails_its_own_request_only(base, make_sampler):
    client = make_sampler(base).client(None, 0)

    def bad(*_):
        raise RuntimeError("no more disk")

    other = client.sample(PROMPT, 1, LONG)
    failing = client.sample(PROMPT, 2, LONG, on_tokens=bad)
    with pytest.raises(ModelError, match="callback on_tokens failed: RuntimeError: no more disk") as caught:
        failing.result(TIMEOUT)
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert len(other.result(TIMEOUT).sequences[0].tokens) == 90


def test_a_failing_forward_fails_its_requests_and_the_thread_lives(base, adapter, make_adapter, make_sampler):
    from nat_plugin_evsys.engine.model.lora import LoraAdapter

    sampler = make_sampler(base)
    name = next(iter(adapter.weights))
    a, b = adapter.weights[name]
    torn = LoraAdapter(adapter.rank, adapter.alpha, {**adapter.weights, name: (a[:, :-1], b)})
    with pytest.raises(ModelError, match="sampling from policy version 7 failed: RuntimeError"):
        short(sampler.client(torn, 7)).result(TIMEOUT)
    with pytest.raises(ModelError, match="version 7"):
        sampler.client(torn, 7).compute_logprobs(PROMPT).result(TIMEOUT)
    assert len(short(sampler.client(adapter, 8)).result(TIMEOUT).sequences[0].tokens) == 5


@pytest.mark.parametrize("value", [float("nan"), 3e38], ids=["nan", "overflows"])
def test_weights_that_are_not_finite_are_named_and_do_not_spread(value, base, adapter, make_sampler, plain_logits):
    from nat_plugin_evsys.engine.model.lora import LoraAdapter

    sampler = make_sampler(base)
    nan = LoraAdapter(
        adapter.rank, adapter.alpha, {n: (a, torch.full_like(b, value)) for n, (a, b) in adapter.weights.items()}
    )
    long = ModelInput.from_ints(list(range(1, 31)))
    before = short(sampler.client(adapter, 0)).result(TIMEOUT).sequences
    broken = sampler.client(nan, 1)
    with pytest.raises(ModelError, match="not finite"):
        broken.sample(long, 4, LONG).result(TIMEOUT)
    with pytest.raises(ModelError, match="not finite"):
        broken.compute_logprobs(PROMPT).result(TIMEOUT)
    wait_idle(sampler)
    # The same memory serves the next policy: the short row's masked columns lie where the broken rows were.
    hold = Hold()
    client = sampler.client(adapter, 2)
    first = client.sample(PROMPT, 1, SamplingParams(max_tokens=1), on_tokens=hold)
    hold.wait()
    futures = [short(client), client.sample(long, 1, SHORT)]
    hold.release()
    assert len(first.result(TIMEOUT).sequences[0].tokens) == 1
    results = [f.result(TIMEOUT) for f in futures]
    assert_same_samples(results[0].sequences, before, PROMPT.to_ints(), SHORT, partial(plain_logits, base, adapter))


def test_closing_fails_what_is_in_flight(base, make_sampler):
    sampler = make_sampler(base, max_batch_size=1)
    client = sampler.client(None, 0)
    started = threading.Event()
    running = client.sample(PROMPT, 1, LONG, on_tokens=lambda *_: started.set() or time.sleep(0.01))
    waiting = short(client)
    assert started.wait(TIMEOUT)
    sampler.close()
    for future in (running, waiting):
        with pytest.raises(EngineClosedError):
            future.result(1)


def test_versions_in_flight_do_not_wait_for_each_other_nor_mix(base, make_adapter, make_sampler, plain_logits):
    sampler = make_sampler(base, max_batch_size=2)
    old_adapter, new_adapter = make_adapter(base, 1), make_adapter(base, 2)
    old, new = sampler.client(old_adapter, 4), sampler.client(new_adapter, 5)
    alone = [
        make_sampler(base).client(a, 0).sample(PROMPT, 2, LONG).result(TIMEOUT) for a in (old_adapter, new_adapter)
    ]
    order = []
    running = old.sample(PROMPT, 2, LONG, on_tokens=lambda *_: order.append("old"))
    while not order:
        time.sleep(0.001)
    late = new.sample(PROMPT, 2, LONG, on_tokens=lambda *_: order.append("new"))
    results = [running.result(TIMEOUT), late.result(TIMEOUT)]
    assert [r.policy_version for r in results] == [4, 5]
    for result, want, weights in zip(results, alone, (old_adapter, new_adapter), strict=True):
        logits_of = partial(plain_logits, base, weights)
        assert_same_samples(result.sequences, want.sequences, PROMPT.to_ints(), LONG, logits_of)
    assert results[0].sequences[0].tokens != results[1].sequences[0].tokens
    # the new version's first token came while the old one was still decoding, whose rows fill the batch
    assert order.index("new") < len(order) - 1 - order[::-1].index("old")


def test_two_clients_of_the_bare_model_report_their_own_versions(base, make_sampler, plain_logits):
    sampler = make_sampler(base)
    futures = [short(sampler.client(None, version)) for version in (0, 6, 0)]
    assert [f.result(TIMEOUT).policy_version for f in futures] == [0, 6, 0]
    first, *others = (f.result().sequences for f in futures)
    for other in others:
        assert_same_samples(first, other, PROMPT.to_ints(), SHORT, partial(plain_logits, base, None))


def test_training_beside_changes_no_sample(base, adapter, make_sampler, plain_logits):
    """Another thread trains its own adapter through the same base model while requests are decoded."""
    from nat_plugin_evsys.engine.model.lora import LoraAdapter, applied

    client = make_sampler(base).client(adapter, 0)
    params = SamplingParams(max_tokens=60, seed=1, stop=[])
    prompts = [ModelInput.from_ints([i, i + 1, i + 2]) for i in range(1, 30)]
    want = [client.sample(p, 1, params).result(TIMEOUT) for p in prompts]
    live = LoraAdapter.create(base.model, rank=2, alpha=4)
    stop, losses = threading.Event(), []

    def train():
        while not stop.is_set():
            with applied(live):
                logits = base.model(input_ids=torch.arange(1, 30)[None]).logits
            loss = -logits.log_softmax(-1)[..., 5].sum()
            loss.backward()
            with torch.no_grad():
                for _, tensor in live.named_tensors():
                    tensor -= 1e-3 * tensor.grad
                    tensor.grad = None
            losses.append(float(loss.detach()))

    thread = threading.Thread(target=train)
    thread.start()
    try:
        got = [f.result(TIMEOUT) for f in [client.sample(p, 1, params) for p in prompts * 3]]
    finally:
        stop.set()
        thread.join()
    for prompt, found, expected in zip(prompts * 3, got, want * 3, strict=True):
        logits_of = partial(plain_logits, base, adapter)
        assert_same_samples(found.sequences, expected.sequences, prompt.to_ints(), params, logits_of)
    assert len(losses) > 3
    assert losses[-1] < losses[0]


def test_a_prompt_is_prefilled_once_for_its_samples_and_for_its_twins(base, adapter, make_sampler):
    prompt = ModelInput.from_ints(list(range(1, 61)))
    one = SamplingParams(max_tokens=1, seed=0)
    sampler = make_sampler(base, prefix_cache_bytes=0)
    client = sampler.client(adapter, 0)
    hold = Hold()
    blocker = client.sample(PROMPT, 1, SamplingParams(max_tokens=2, stop=[]), on_tokens=hold)
    hold.wait()
    futures = [client.sample(prompt, 8, one) for _ in range(4)]  # all of them wait while the first is held
    hold.release()
    for future in [blocker, *futures]:
        future.result(TIMEOUT)
    assert sampler.fed_tokens == 3 + 1 + 60


def test_kept_prefixes_change_nothing_and_feed_less(base, adapter, make_sampler, plain_logits):
    plain, cached = make_sampler(base, prefix_cache_bytes=0), make_sampler(base)
    turns = [list(range(1, 40)), [50, 51, 52], [60] * 10]
    clients, ids = [sampler.client(adapter, 0) for sampler in (plain, cached)], []
    for i, turn in enumerate(turns):  # an episode: each prompt is all that was read and sampled, and some more
        ids = ids + turn
        params = SamplingParams(max_tokens=8, seed=i, stop=[])
        for _ in range(2):
            a, b = (client.sample(ModelInput.from_ints(ids), 2, params, True).result(TIMEOUT) for client in clients)
            assert_same_samples(a.sequences, b.sequences, ids, params, partial(plain_logits, base, adapter))
            assert np.allclose(a.prompt_logprobs_np, b.prompt_logprobs_np, atol=1e-5, equal_nan=True)
        again = [client.sample(ModelInput.from_ints(ids), 1, params).result(TIMEOUT) for client in clients]
        assert [result.prompt_cache_hit_tokens > 0 for result in again] == [False, True]
        ids = ids + b.sequences[0].tokens
    assert cached.fed_tokens < plain.fed_tokens


def test_a_prefix_is_never_reused_by_another_version(base, make_adapter, make_sampler, plain_logits):
    sampler = make_sampler(base)
    prompt = ModelInput.from_ints(list(range(1, 50)))
    params = SamplingParams(max_tokens=10, seed=3, stop=[])
    for seed in (1, 2, 1):  # the same number for all: what counts is whose weights they are
        adapter = make_adapter(base, seed)
        got = sampler.client(adapter, 0).sample(prompt, 1, params).result(TIMEOUT)
        assert got.prompt_cache_hit_tokens == 0
        alone = make_sampler(base, prefix_cache_bytes=0).client(adapter, 0).sample(prompt, 1, params).result(TIMEOUT)
        logits_of = partial(plain_logits, base, adapter)
        assert_same_samples(got.sequences, alone.sequences, prompt.to_ints(), params, logits_of)


@pytest.mark.parametrize("path", ["auto", "plain"])
def test_the_prefix_memory_is_bounded(path, base, adapter, make_sampler):
    bound = 40_000
    sampler = make_sampler(base, prefix_cache_bytes=bound, path=path)
    prefixes = sampler._spans if path == "auto" else sampler._prefixes
    client = sampler.client(adapter, 0)
    rng = np.random.default_rng(0)
    for _ in range(12):
        prompt = ModelInput.from_ints(rng.integers(1, 300, 60).tolist())
        client.sample(prompt, 1, SamplingParams(max_tokens=2)).result(TIMEOUT)
        wait_idle(sampler)
        assert 0 < prefixes.used_bytes <= bound
        kept = prefixes.spans() if path == "auto" else prefixes._blocks.values()
        assert sum(each.kv.nbytes for each in kept) == prefixes.used_bytes


def test_a_model_without_attention_everywhere_is_sampled_through_its_own_cache(
    tokenizer, make_sampler, plain_logits, caplog
):
    import transformers

    from nat_plugin_evsys.engine.model.loading import wrap_model

    config = transformers.Qwen3NextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=64, num_experts=2, num_experts_per_tok=1,
        layer_types=["linear_attention", "full_attention"],
        moe_intermediate_size=16, shared_expert_intermediate_size=16,
        linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=16, linear_value_head_dim=16,
    )  # fmt: skip
    base = wrap_model("hybrid", transformers.Qwen3NextForCausalLM(config), tokenizer)
    sampler = make_sampler(base)
    assert re.search(r"cannot sample from 'qwen3_next'.*linear_attention", sampler.plain_because)
    assert sampler.plain_because in caplog.text
    client = sampler.client(None, 0)
    prompts = [[5, 9, 17, 3, 40, 22, 8], [7, 7]]
    asked = [client.sample(ModelInput.from_ints(p), 2, SamplingParams(max_tokens=5, seed=1, stop=[])) for p in prompts]
    scored = client.compute_logprobs(ModelInput.from_ints(prompts[0])).result(TIMEOUT)
    for prompt, future in zip(prompts, asked, strict=True):
        for sequence in future.result(TIMEOUT).sequences:
            tokens = [*prompt, *sequence.tokens]
            lp = plain_logits(base, None, tokens).log_softmax(-1)
            want = [float(lp[at - 1, tokens[at]]) for at in range(len(prompt), len(tokens))]
            assert sequence.logprobs == pytest.approx(want, abs=1e-5)
    lp = plain_logits(base, None, prompts[0]).log_softmax(-1)
    assert scored[1:] == pytest.approx([float(lp[i, t]) for i, t in enumerate(prompts[0][1:])], abs=1e-5)
