"""What fails half-way through a step fails its requests, and the policy and all others are sampled on."""

from __future__ import annotations

import math
import time
import traceback
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hold import Hold
from tinker.types import ModelInput, SamplingParams

from nat_plugin_evsys.engine import sampler as sampler_module
from nat_plugin_evsys.engine.model.loading import BaseModel
from nat_plugin_evsys.engine.model.lora import LoraAdapter
from nat_plugin_evsys.engine.sampler import Sampler
from nat_plugin_evsys.engine.sampling import kv_cache
from nat_plugin_evsys.engine.sampling.decode_batch import DecodeBatch
from nat_plugin_evsys.engine.sampling.exact_runner import ExactRunner
from nat_plugin_evsys.engine.sampling.model_runner import ModelRunner
from nat_plugin_evsys.engine.sampling.prefix_cache import PrefixCache
from nat_plugin_evsys.engine.spans.rollout_model import RolloutModel
from nat_plugin_evsys.engine.spans.tree import SpanTree
from nat_plugin_evsys.errors import DataError, ModelError

TIMEOUT = 60
BRIEF = ModelInput.from_ints([9, 8, 7])
LONG = ModelInput.from_ints(list(range(1, 71)))  # longer than a store is at first
PARAMS = SamplingParams(max_tokens=6, seed=1, stop=[])


def tokens(client: Any, prompt: ModelInput, rows: int = 1) -> list[list[int]]:
    result = client.sample(prompt, rows, PARAMS).result(TIMEOUT)
    return [sequence.tokens for sequence in result.sequences]


def wait_idle(sampler: Sampler) -> None:
    deadline = time.monotonic() + 10
    while sampler._batches and time.monotonic() < deadline:
        time.sleep(0.005)
    assert not sampler._batches


def once(failing: Callable[..., Any], error: Exception, when: Callable[..., bool]) -> Callable[..., Any]:
    """``failing``, which raises the first time that ``when`` holds of its arguments."""
    left = [error]

    def call(*given: Any, **named: Any) -> Any:
        if left and when(*given):
            raise left.pop()
        return failing(*given, **named)

    return call


@pytest.mark.parametrize("path", ["auto", "plain"])
def test_where_memory_for_rows_ran_out_once_all_policies_are_sampled_on(
    path: str,
    base: BaseModel,
    adapter: LoraAdapter,
    make_sampler: Callable[..., Sampler],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fresh = make_sampler(base, path=path)
    want = [tokens(fresh.client(each, 0), LONG, 3) for each in (None, adapter)]
    sampler = make_sampler(base, path=path)
    client = sampler.client(None, 0)
    tokens(client, BRIEF)
    wait_idle(sampler)
    no_memory = MemoryError("no memory for 3 MiB")
    zeros = once(kv_cache.mapped_zeros, no_memory, lambda shape, *_: math.prod(shape) > 0)
    monkeypatch.setattr(kv_cache, "mapped_zeros", zeros)
    with pytest.raises(ModelError, match="MemoryError: no memory for 3 MiB"):
        tokens(client, LONG, 3)
    wait_idle(sampler)
    assert sampler._spans.held_bytes == 0
    assert [tokens(client, LONG, 3), tokens(sampler.client(adapter, 1), LONG, 3)] == want
    wait_idle(sampler)


def test_a_request_that_cannot_even_join_fails_and_the_thread_lives(
    base: BaseModel, make_sampler: Callable[..., Sampler], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = make_sampler(base, path="plain").client(None, 0)
    zeros = once(kv_cache.mapped_zeros, MemoryError("no memory for 3 MiB"), lambda *_: True)
    monkeypatch.setattr(kv_cache, "mapped_zeros", zeros)
    with pytest.raises(ModelError, match="no memory for 3 MiB"):
        tokens(client, BRIEF)
    assert len(tokens(client, BRIEF)[0]) == 6


def test_a_context_that_fails_after_another_was_read_leaves_no_row_behind(
    base: BaseModel, make_sampler: Callable[..., Sampler], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = ExactRunner(base, cached=True)
    monkeypatch.setattr(sampler_module, "trusted_runner", lambda base: (runner, "it was asked for"))
    sampler = make_sampler(base)
    client = sampler.client(None, 0)
    want = [tokens(client, BRIEF, 2), tokens(client, LONG, 2)]
    read = once(runner.read, RuntimeError("out of memory, once"), lambda _, ids, *__: len(ids) == 70)
    monkeypatch.setattr(runner, "read", read)
    hold = Hold()
    held = client.sample(BRIEF, 1, SamplingParams(max_tokens=1), on_tokens=hold)
    hold.wait()
    futures = [client.sample(prompt, 2, PARAMS) for prompt in (BRIEF, LONG)]
    hold.release()
    held.result(TIMEOUT)
    for future in futures:
        with pytest.raises(ModelError, match="out of memory, once"):
            future.result(TIMEOUT)
    wait_idle(sampler)
    assert [tokens(client, BRIEF, 2), tokens(client, LONG, 2)] == want


@pytest.mark.parametrize(("path", "cache"), [("auto", SpanTree), ("plain", PrefixCache)])
def test_what_cannot_be_kept_of_a_row_that_ended_takes_no_other_rows_place(
    path: str,
    cache: Any,
    base: BaseModel,
    adapter: LoraAdapter,
    make_sampler: Callable[..., Sampler],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sampler = make_sampler(base, path=path)
    client = sampler.client(adapter, 0)
    want = tokens(client, BRIEF, 3)
    wait_idle(sampler)
    hold = Hold()
    longer = client.sample(BRIEF, 1, SamplingParams(max_tokens=20, seed=2, stop=[]), on_tokens=hold)
    hold.wait()
    ends = client.sample(BRIEF, 3, PARAMS)
    add = once(cache.add, MemoryError("no memory for 3 MiB"), lambda *given: len(given[2]) > len(BRIEF.to_ints()))
    monkeypatch.setattr(cache, "add", add)
    hold.release()
    with pytest.raises(ModelError, match="no memory for 3 MiB"):
        longer.result(TIMEOUT)
    with pytest.raises(ModelError, match="no memory for 3 MiB"):
        ends.result(TIMEOUT)
    wait_idle(sampler)
    assert sampler._spans.held_bytes == 0
    assert tokens(client, BRIEF, 3) == want
    wait_idle(sampler)


@pytest.mark.parametrize(
    ("path", "failing"),
    [("auto", (RolloutModel, "logits")), ("plain", (ModelRunner, "_forward")), ("plain", (DecodeBatch, "step"))],
)
def test_the_error_of_a_failed_pass_keeps_its_traceback_and_no_activations(
    path: str,
    failing: tuple[Any, str],
    base: BaseModel,
    make_sampler: Callable[..., Sampler],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client = make_sampler(base, path=path).client(None, 0)
    activations: list[weakref.ref[torch.Tensor]] = []

    def out_of_memory(*_: Any, **__: Any) -> None:
        layer = torch.zeros(8)
        activations.append(weakref.ref(layer))
        try:
            raise torch.OutOfMemoryError("no memory for 3 GiB")
        except RuntimeError as exc:
            raise ValueError("in the layer") from exc

    monkeypatch.setattr(*failing, out_of_memory)
    error = client.sample(BRIEF, 1, PARAMS).exception(TIMEOUT)
    assert isinstance(error, ModelError)
    assert activations
    assert [each() for each in activations] == [None] * len(activations)
    told = "".join(traceback.format_exception(error))
    for line in ("no memory for 3 GiB", 'raise ValueError("in the layer") from exc', "in out_of_memory"):
        assert line in told


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_token_is_sampled_from_queries_that_are_not_finite(
    value: float, base: BaseModel, adapter: LoraAdapter, make_sampler: Callable[..., Sampler]
) -> None:
    """Over so few keys as these the attention of the fast path makes numbers of NaN."""
    weights = {
        name: (a, torch.full_like(b, value) if name.endswith("0.self_attn.q_proj") else b)
        for name, (a, b) in adapter.weights.items()
    }
    client = make_sampler(base).client(LoraAdapter(adapter.rank, adapter.alpha, weights), 1)
    with pytest.raises(ModelError, match="version 1 gives logits that are not finite"):
        tokens(client, BRIEF)


def test_an_error_of_this_package_from_a_callback_reaches_the_caller_as_it_is(
    base: BaseModel, make_sampler: Callable[..., Sampler]
) -> None:
    error = DataError("the form of the reply is broken")

    def refuse(*_: Any) -> None:
        raise error

    future = make_sampler(base).client(None, 0).sample(BRIEF, 1, PARAMS, on_tokens=refuse)
    assert future.exception(TIMEOUT) is error
