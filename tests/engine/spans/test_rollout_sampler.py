"""The sampler's fast path gives what its plain path gives, computes each distinct token once, and cleans up."""

from __future__ import annotations

import gc
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from typing import Any

import pytest
import torch
from hold import Hold
from samples import assert_same_samples
from tinker.types import ModelInput, SamplingParams
from tiny import VOCAB, WINDOW, perturb

from nat_plugin_evsys.engine.model.loading import BaseModel
from nat_plugin_evsys.engine.model.lora import LoraAdapter, applied
from nat_plugin_evsys.engine.sampler import Sampler
from nat_plugin_evsys.engine.spans import decoder as span_decoder
from nat_plugin_evsys.engine.spans import packed_linear
from nat_plugin_evsys.engine.spans.packed_linear import PackedVersions
from nat_plugin_evsys.engine.spans.rollout_model import RolloutModel
from nat_plugin_evsys.errors import ModelError

FAST = ["qwen3", "qwen2", "llama", "llama3_rope", "granite", "qwen3_moe"]
PLAIN = {
    "mistral": f"attend to {WINDOW} tokens only",
    "gemma2": f"attend to {WINDOW} tokens only",
    "gemma3": f"attend to {WINDOW} tokens only",
    "dynamic_rope": "rotary embedding depends",
}
TIMEOUT = 60


def perturbed(base: BaseModel, seed: int = 0, **options: bool) -> LoraAdapter:
    adapter = LoraAdapter.create(base.model, rank=4, alpha=8.0, seed=seed, **options)
    return perturb(adapter, seed, std=0.1).snapshot()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.002)
    assert condition()


def ids(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(VOCAB), k=length)


@pytest.fixture
def sampler_of(base_of: Callable[..., BaseModel]) -> Iterator[Callable[..., Sampler]]:
    made: list[Sampler] = []

    def make(family: str = "qwen3", **options: Any) -> Sampler:
        made.append(Sampler(base_of(family), **options))
        return made[-1]

    yield make
    for sampler in made:
        sampler.close()


def params(tokens: int = 8, seed: int = 0, **options: Any) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, seed=seed, stop=[], **options)


def ask(client: Any, prompt: list[int], samples: int = 1, tokens: int = 8) -> Future[Any]:
    return client.sample(ModelInput.from_ints(prompt), samples, params(tokens))


Asked = tuple[list[int], int, SamplingParams]


def episodes(client: Any, told: list[Any] | None = None) -> list[tuple[Asked, Any]]:
    """Groups that share a beginning, one that is another's prefix, duplicates; then turns that go on from samples.

    Args:
        told: results whose samples the later turns go on from; default: those of this client.
    """
    shared = ids(30, 0)
    prompts = [shared + ids(9, 1), shared + ids(14, 2), shared, shared + ids(9, 1), ids(1, 3), ids(50, 4)]
    results: list[tuple[Asked, Any]] = []
    for turn in range(3):
        asked: list[Asked] = [
            (p, 1 + i % 3, params(5 + 4 * i, seed=10 * turn + i, temperature=0.7 + 0.2 * i))
            for i, p in enumerate(prompts)
        ]
        futures = [client.sample(ModelInput.from_ints(p), n, each) for p, n, each in asked]
        answers = [f.result(TIMEOUT) for f in futures]
        results += zip(asked, answers, strict=True)
        said = answers if told is None else told[len(results) - len(answers) : len(results)]
        prompts = [p + a.sequences[-1].tokens + ids(5, 7 + turn) for p, a in zip(prompts, said, strict=True)]
    return results


def plain_logits(base: BaseModel, adapter: LoraAdapter | None, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad(), applied(adapter):
        return base.model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]


@pytest.mark.parametrize(
    ("family", "most_taken"), [*((family, 128) for family in FAST), ("qwen3", 0), ("qwen3", 12), ("granite", 0)]
)
def test_fast_and_plain_sample_the_same(
    family: str,
    most_taken: int,
    sampler_of: Callable[..., Sampler],
    base_of: Callable[..., BaseModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Ends of contexts are read in the tree, in the rows' slots, or some here and some there.
    monkeypatch.setattr(span_decoder, "_MOST_TAKEN", most_taken)
    adapter = perturbed(base_of(family), train_unembed=True)
    fast, plain, tight = sampler_of(family), sampler_of(family, path="plain"), sampler_of(family, max_batch_size=3)
    tight._runner.prefill_tokens = 7  # prompts in pieces, beside the rows being decoded
    assert fast.plain_because == ""
    assert plain.plain_because
    expected = [result for _, result in episodes(plain.client(adapter, 0))]
    logits_of = partial(plain_logits, base_of(family), adapter)
    for sampler in (fast, tight):
        found = episodes(sampler.client(adapter, 0), expected)
        for ((prompt, _, asked), got), want in zip(found, expected, strict=True):
            assert_same_samples(got.sequences, want.sequences, prompt, asked, logits_of)
    assert fast.fed_tokens <= plain.fed_tokens
    assert fast._spans.held_bytes == tight._spans.held_bytes == 0


@pytest.mark.parametrize("family", PLAIN)
def test_what_the_fast_path_does_not_fit_says_so(
    family: str, sampler_of: Callable[..., Sampler], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        sampler = sampler_of(family)
    assert PLAIN[family] in sampler.plain_because
    assert sampler.plain_because in caplog.text
    assert len(ask(sampler.client(None, 0), ids(20, 0), 2).result(TIMEOUT).sequences[1].tokens) == 8


def test_every_distinct_token_is_fed_once(sampler_of: Callable[..., Sampler]) -> None:
    sampler = sampler_of()
    client = sampler.client(None, 0)
    hold = Hold()
    held = client.sample(ModelInput.from_ints([1, 2, 3]), 1, params(1), on_tokens=hold)
    hold.wait()
    shared = [5, *ids(39, 0)]
    futures = [ask(client, [*shared, i, *ids(9, i)], 4, tokens=6) for i in range(4)]  # arrive together
    hold.release()
    for future in (held, *futures):
        future.result(TIMEOUT)
    once = 3 + 40 + 4 * 10
    assert sampler.fed_tokens == once + 4 * 4 * 5  # the last token of a sample is not fed
    turn = ask(client, [*shared, 0, *ids(9, 0), *futures[0].result().sequences[2].tokens, 7, 8, 9], tokens=1)
    assert turn.result(TIMEOUT).prompt_cache_hit_tokens == 40 + 10 + 5
    assert sampler.fed_tokens == once + 4 * 4 * 5 + 1 + 3


def test_a_cancelled_context_leaves_nothing_half_computed(
    sampler_of: Callable[..., Sampler], base_of: Callable[..., BaseModel]
) -> None:
    sampler = sampler_of()
    sampler._runner.prefill_tokens = 4
    client = sampler.client(None, 0)
    started = threading.Event()
    running = client.sample(ModelInput.from_ints([1]), 1, params(200), on_tokens=lambda *_: started.set())
    assert started.wait(TIMEOUT)
    prompt = ids(120, 5)
    first = ask(client, prompt)
    assert first.cancel()
    running.result(TIMEOUT)
    again = ask(client, prompt).result(TIMEOUT).sequences
    fresh = ask(sampler_of().client(None, 0), prompt).result(TIMEOUT).sequences
    assert_same_samples(again, fresh, prompt, params(), partial(plain_logits, base_of("qwen3"), None))


def test_a_failing_pass_releases_what_it_held(
    sampler_of: Callable[..., Sampler], base_of: Callable[..., BaseModel]
) -> None:
    sampler = sampler_of()
    adapter = perturbed(base_of("qwen3"))
    name = next(iter(adapter.weights))
    a, b = adapter.weights[name]
    torn = LoraAdapter(adapter.rank, adapter.alpha, {**adapter.weights, name: (a[:, :-1], b)})
    with pytest.raises(ModelError, match="RuntimeError"):
        ask(sampler.client(torn, 1), ids(20, 0), 3).result(TIMEOUT)
    assert len(ask(sampler.client(adapter, 2), ids(20, 0), 3).result(TIMEOUT).sequences) == 3
    sampler.close()
    assert not list(sampler._spans.spans())


def test_packed_layers_equal_plain_ones_and_versions_do_not_mix(base_of: Callable[..., BaseModel]) -> None:
    base = base_of("qwen2")  # its attention has biases
    model = RolloutModel(base)
    layers = model.versions._layers
    assert {layer.name for layer in layers} >= {"lm_head", "model.layers.1.mlp.down_proj"}
    adapters = {0: None, 1: perturbed(base, 1), 2: perturbed(base, 2, train_unembed=True)}
    torch.manual_seed(0)
    for ident in (1, 0, 2, 1, 2):
        adapter = adapters[ident]
        model.versions.use(ident, adapter)
        for layer in layers:
            for rows in (1, 5, 40):
                x = torch.randn(rows, layer.weight.shape[1])
                with torch.inference_mode(), applied(adapter):
                    assert layer.packed is not None
                    assert torch.allclose(layer(x), layer.plain(x), atol=2e-6)
    head = next(layer for layer in layers if layer.name == "lm_head")
    heads = {i: weights["lm_head"] for i, weights in model.versions._in_flight.items() if weights is not None}
    assert heads[0] is heads[1] is not heads[2]  # what no adapter changes is there once
    for ident in adapters:
        model.versions.done(ident)
    assert head.packed is None
    assert len(model.versions._idle) == 2


@pytest.mark.parametrize("path", ["auto", "plain"])
def test_nothing_is_kept_of_a_version_whose_clients_are_gone(
    path: str, sampler_of: Callable[..., Sampler], base_of: Callable[..., BaseModel]
) -> None:
    sampler = sampler_of(path=path)
    clients = {ident: sampler.client(perturbed(base_of("qwen3"), ident), ident) for ident in range(2)}
    for client in clients.values():
        ask(client, ids(40, 0), 2).result(TIMEOUT)
    kept = sampler._spans.used_bytes + sampler._prefixes.used_bytes
    del client, clients[0]
    gc.collect()
    ask(clients[1], ids(40, 0), 2).result(TIMEOUT)  # all of it is known
    wait_for(lambda: not sampler._batches)
    assert sampler._spans.used_bytes + sampler._prefixes.used_bytes == kept // 2
    if sampler._fast is not None:
        versions = sampler._fast.versions
        assert list(versions._idle) == [clients[1].policy_ident]
        sampler.rest(clients[1])
        assert not versions._idle
    assert ask(clients[1], ids(40, 0), 2).result(TIMEOUT).sequences


def test_a_version_without_room_for_its_weights_is_sampled_unmerged(
    sampler_of: Callable[..., Sampler],
    base_of: Callable[..., BaseModel],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    adapter = perturbed(base_of("qwen3"))
    want = ask(sampler_of().client(adapter, 0), ids(20, 0), 2).result(TIMEOUT)
    monkeypatch.setattr(packed_linear, "_FREE_SHARE", 0.0)
    with caplog.at_level(logging.INFO):
        got = ask(sampler_of().client(adapter, 0), ids(20, 0), 2).result(TIMEOUT)
    assert "no memory for merged weights" in caplog.text
    logits_of = partial(plain_logits, base_of("qwen3"), adapter)
    assert_same_samples(got.sequences, want.sequences, ids(20, 0), params(), logits_of)


@pytest.mark.parametrize("adapted", [False, True])
def test_a_reordered_product_that_is_wrong_is_not_used(
    adapted: bool,
    sampler_of: Callable[..., Sampler],
    base_of: Callable[..., BaseModel],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    adapter = perturbed(base_of("qwen3")) if adapted else None
    want = ask(sampler_of(path="plain").client(adapter, 0), ids(20, 0), 2).result(TIMEOUT)
    right = packed_linear.few_rows_product
    monkeypatch.setattr(packed_linear, "few_rows_product", lambda *arguments: right(*arguments) * 1.05)
    got = ask(sampler_of().client(adapter, 0), ids(20, 0), 2).result(TIMEOUT)
    assert "sampled from unmerged weights, slower: reordered ones give" in caplog.text
    logits_of = partial(plain_logits, base_of("qwen3"), adapter)
    assert_same_samples(got.sequences, want.sequences, ids(20, 0), params(), logits_of)


def test_a_wrong_merge_is_not_used_even_after_the_bare_model(
    base_of: Callable[..., BaseModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_of("qwen3")
    versions = RolloutModel(base).versions
    versions.use(0, None)
    broken = perturbed(base, 1)
    next(iter(broken.weights.values()))[0].fill_(float("nan"))
    versions.use(1, broken)  # its weights are as they are merged
    right = torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *a, alpha, out: right(*a, alpha=0.9 * alpha, out=out))
    versions.use(2, perturbed(base, 2))
    assert [weights is None for weights in versions._in_flight.values()] == [False, False, True]


def test_the_trainer_is_not_touched(base_of: Callable[..., BaseModel]) -> None:
    base = base_of("qwen3")
    before = {name: type(module) for name, module in base.model.named_modules()}
    attention = base.model.config._attn_implementation
    storages = {p.data_ptr() for p in base.model.parameters()}
    model = RolloutModel(base)
    assert {name: type(module) for name, module in base.model.named_modules()} == before
    assert base.model.config._attn_implementation == attention
    assert {p.data_ptr() for p in model._decoder.parameters()} <= storages


def test_packed_weights_are_for_fp32_only() -> None:
    versions = PackedVersions([], torch.bfloat16)
    versions.use(0, None)
    assert versions._in_flight == {0: None}
