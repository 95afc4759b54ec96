"""Fused layers against transformers' own: hidden states and gradients, with all rows read and with some."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from tiny import perturb, tiny_model
from torch import Tensor

from nat_plugin_evsys.engine.gradient.fast_forward import FastForward
from nat_plugin_evsys.engine.gradient.fast_verdict import fast_forward
from nat_plugin_evsys.engine.machine import memory
from nat_plugin_evsys.engine.model.forward import OutputHead
from nat_plugin_evsys.engine.model.loading import BaseModel, wrap_model
from nat_plugin_evsys.engine.model.lora import LoraAdapter
from nat_plugin_evsys.engine.tree.attention import attend_backward
from nat_plugin_evsys.engine.tree.fused_decoder import FusedDecoder
from nat_plugin_evsys.engine.tree.linear_stack import AdaptedStack
from nat_plugin_evsys.engine.tree.trie import TokenTrie


def adapter_of(base: BaseModel, **lora: bool) -> LoraAdapter:
    return perturb(LoraAdapter.create(base.model, rank=4, alpha=8.0, seed=1, **lora), seed=2)


def randomise_vectors(base: BaseModel) -> None:
    """Biases and norms are 0 and 1 in a new model, which would hide a mistake."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in base.model.parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0, 0.3, generator=generator)


def step(base: BaseModel, adapter: LoraAdapter, read: Tensor, *, fuse: bool, keep: bool = True) -> list[Tensor]:
    """Hidden states, and the gradient of a fixed linear function of them by every LoRA matrix."""
    rng = np.random.default_rng(0)
    trunk = rng.integers(0, 90, 90)
    trie = TokenTrie.build(
        [np.concatenate([trunk[:k], rng.integers(0, 90, n)]) for k, n in ((90, 9), (90, 9), (40, 30))]
    )
    assert len(trie) == 138
    fast = FastForward(base, OutputHead(base.model), fuse=fuse)
    assert (fast.fused is not None) == fuse
    hidden = fast.hidden(trie, read, adapter, keep=keep)
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(5))
    leaves = [t for _, t in adapter.named_tensors()]
    return [hidden.detach(), *torch.autograd.grad((hidden * weights).sum(), leaves)]


READS = {"all": torch.arange(138), "some": torch.cat([torch.arange(3), torch.arange(85, 100), torch.tensor([137])])}


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama", "llama3_rope"])
@pytest.mark.parametrize("reads", ["all", "some"])
@pytest.mark.parametrize("keep", [True, False])
def test_fused_layers_are_the_layers(family: str, reads: str, keep: bool, base_of: Any) -> None:
    base = base_of(family)
    fast_forward(base, OutputHead(base.model))  # installs tree attention
    adapter = adapter_of(base)
    expected = step(base, adapter, READS[reads], fuse=False)
    found = step(base, adapter, READS[reads], fuse=True, keep=keep)
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).abs().max() / b.abs().max()) < 1e-5


@pytest.mark.parametrize("onednn", [True, False])
def test_either_library_of_products(onednn: bool, base_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_of("qwen3")
    fast_forward(base, OutputHead(base.model))
    adapter = adapter_of(base)
    monkeypatch.setattr("nat_plugin_evsys.engine.machine.products.prefers_onednn", lambda: onednn)
    found, expected = (step(base, adapter, READS["some"], fuse=fuse) for fuse in (True, False))
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).abs().max() / b.abs().max()) < 1e-5


@pytest.mark.parametrize("lora", [{}, {"train_mlp": False}, {"train_attn": False}])
def test_biases_norms_and_layers_without_lora(lora: dict[str, bool]) -> None:
    model = tiny_model("llama", initializer_range=0.3, attention_bias=True, mlp_bias=True)
    base = wrap_model("biased", model, None)
    randomise_vectors(base)
    fast_forward(base, OutputHead(base.model))
    adapter = adapter_of(base, **lora)
    found, expected = (step(base, adapter, READS["some"], fuse=fuse) for fuse in (True, False))
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).abs().max() / b.abs().max()) < 1e-5


def test_layers_of_another_shape_stay_transformers_own(base_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for family in ("gemma3", "qwen3_moe", "granite"):
        assert FusedDecoder.of(base_of(family).model) is None
    assert FusedDecoder.of(base_of("qwen3", None, torch.bfloat16).model) is None
    gelu = tiny_model("llama", hidden_act="gelu")
    assert FusedDecoder.of(wrap_model("gelu", gelu, None).model) is None


def test_a_fused_layer_that_computes_something_else_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    base = wrap_model("shifted", tiny_model("llama", num_hidden_layers=1), None)
    forward = type(base.model.model.layers[0]).forward
    monkeypatch.setattr(type(base.model.model.layers[0]), "forward", lambda *a, **k: forward(*a, **k) + 1)
    fast, refusal = fast_forward(base, OutputHead(base.model))
    assert not refusal
    assert fast is not None
    assert fast.fused is None
    assert "transformers' own layers" in caplog.text


def test_fused_layers_that_scale_an_adapter_otherwise_are_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = AdaptedStack.__init__
    monkeypatch.setattr(
        AdaptedStack, "__init__", lambda self, stack, pairs, scale: made(self, stack, pairs, scale * 0.9)
    )
    base = wrap_model("scaled", tiny_model("qwen3"), None)
    fast, refusal = fast_forward(base, OutputHead(base.model))
    assert not refusal
    assert fast is not None
    assert fast.fused is None
    assert "transformers' own layers" in caplog.text


@pytest.mark.parametrize("where", ["fused_layer", "attention"])
def test_a_backward_pass_that_computes_something_else_is_not_used(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both kinds of layer have an attention of their own; its backward pass loses a tenth of the values' part."""

    def loses_some(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        by_query, by_key, by_value = attend_backward(*args)
        return by_query, by_key, 0.9 * by_value

    monkeypatch.setattr(f"nat_plugin_evsys.engine.tree.{where}.attend_backward", loses_some)
    base = wrap_model("lossy", tiny_model("qwen3" if where == "fused_layer" else "gemma3"), None)
    fast, refusal = fast_forward(base, OutputHead(base.model))
    if where == "attention":
        assert "its gradient on a token trie is off by" in refusal
    else:
        assert fast is not None
        assert fast.fused is None


@pytest.mark.parametrize("family", ["gemma3", "qwen3_moe", "granite", "llama4"])
def test_transformers_own_layers_are_computed_again_with_the_same_gradient(family: str, base_of: Any) -> None:
    """Also in a thread that knows neither adapter nor trie, as autograd's own on a GPU; and fewer bytes are kept."""
    base = base_of(family)
    fast, _ = fast_forward(base, OutputHead(base.model))
    assert fast is not None
    assert fast.fused is None
    assert fast.recomputed == 2
    adapter = adapter_of(base)
    rng = np.random.default_rng(0)
    trunk = rng.integers(0, 90, 9)
    trie = TokenTrie.build([np.concatenate([trunk[:k], rng.integers(0, 90, 6)]) for k in (9, 9, 4)])
    read = torch.arange(len(trie))
    found, kept = [], []
    for keep in (True, False):
        saved = memory.SavedBytes([*base.model.parameters(), *(t for _, t in adapter.named_tensors())])
        with saved.counting():
            hidden = fast.hidden(trie, read, adapter, keep=keep)
        weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(5))
        leaves = [t for _, t in adapter.named_tensors()]
        with ThreadPoolExecutor(1) as thread:
            gradient = thread.submit(torch.autograd.grad, (hidden * weights).sum(), leaves, allow_unused=True).result()
        found.append([hidden.detach(), *(g for g in gradient if g is not None)])
        kept.append(saved.total)
    assert kept[1] < kept[0] / 2
    assert len(found[0]) > 4
    for a, b in zip(*found, strict=True):
        assert float((a - b).abs().max() / b.abs().max()) < 1e-5


@pytest.mark.parametrize("family", ["qwen3", "llama", "qwen3_moe", "granite"])
def test_layers_are_computed_again_where_splitting_costs_more(
    family: str, pair: Any, make_datums: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Little free memory and much in common: one pack that recomputes beats packs that repeat the common part."""
    data = make_datums(3, count=40, longest=60)
    whole, small = pair(family)[1], pair(family)[1]
    expected = whole.forward_backward(data, "ppo").metrics
    free = 1.2 * expected["activation_bytes:max"]  # half of it may be used
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    monkeypatch.setattr(memory, "_FEWEST_TOKENS", 16)
    monkeypatch.setattr("nat_plugin_evsys.engine.gradient.micro_batches._PASSES", 100)
    found = small.forward_backward(data, "ppo").metrics
    assert found["recomputed_tokens:sum"] == found["computed_tokens:sum"] == expected["computed_tokens:sum"]
    assert found["activation_bytes:max"] < free / 2
    assert found["activation_predicted_bytes:max"] > found["activation_bytes:max"]
    for name, gradient in whole.gradient.items():
        assert float((small.gradient[name] - gradient).abs().max()) <= 1e-5 * float(gradient.abs().max())


def test_a_sequence_too_long_to_be_kept_is_computed_again(
    pair: Any, make_datums: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, small = pair("granite")[1], pair("granite")[1]
    data = [max(make_datums(3, count=40, longest=60), key=lambda datum: datum.model_input.length)]
    expected = whole.forward_backward(data, "ppo").metrics
    free = 1.2 * expected["activation_bytes:max"]
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    monkeypatch.setattr(memory, "_FEWEST_TOKENS", 16)
    found = small.forward_backward(data, "ppo").metrics
    assert found["recomputed_tokens:sum"] == found["computed_tokens:sum"] == data[0].model_input.length
    assert found["activation_bytes:max"] < free / 2
    for name, gradient in whole.gradient.items():
        assert float((small.gradient[name] - gradient).abs().max()) <= 1e-5 * float(gradient.abs().max())
