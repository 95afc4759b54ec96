"""LoRA: initialisation, selection by role, isolation between threads and adapters."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tinker import types
from torch import Tensor

from nat_plugin_evsys.engine.model.loading import BaseModel
from nat_plugin_evsys.engine.model.lora import LoraAdapter, applied, install
from nat_plugin_evsys.errors import ModelError

IDS = torch.tensor([[5, 17, 99, 3, 42, 150]])
FAMILIES = ["qwen3", "qwen2", "llama", "gemma2", "gemma3", "qwen3_moe", "mixtral"]
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}


def logits(base: BaseModel, adapter: LoraAdapter | None) -> Tensor:
    with torch.no_grad(), applied(adapter):
        return base.model(input_ids=IDS).logits


def leaves(adapter: LoraAdapter) -> set[str]:
    return {name.rsplit(".", 1)[-1] for name in adapter.weights}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_adapter_is_the_base_model(family: str, base_of: Callable[[str], BaseModel]) -> None:
    base = base_of(family)
    adapter = LoraAdapter.create(base.model, rank=4, alpha=8, train_unembed=True)
    assert torch.equal(logits(base, adapter), logits(base, None))


@pytest.mark.parametrize("family", FAMILIES)
def test_roles(family: str, base_of: Callable[[str], BaseModel]) -> None:
    model = base_of(family).model
    off = {"train_attn": False, "train_mlp": False, "train_unembed": False}
    assert leaves(LoraAdapter.create(model, rank=2, alpha=4, **{**off, "train_attn": True})) == ATTENTION
    assert set(LoraAdapter.create(model, rank=2, alpha=4, **{**off, "train_unembed": True}).weights) == {"lm_head"}
    is_moe = family in ("qwen3_moe", "mixtral")
    assert leaves(LoraAdapter.create(model, rank=2, alpha=4)) == (ATTENTION if is_moe else ATTENTION | MLP)
    if is_moe:
        with pytest.raises(ModelError, match=r"train_mlp.*fused"):
            LoraAdapter.create(model, rank=2, alpha=4, **{**off, "train_mlp": True})
    else:
        assert leaves(LoraAdapter.create(model, rank=2, alpha=4, **{**off, "train_mlp": True})) == MLP
    with pytest.raises(ModelError, match="nothing to train"):
        LoraAdapter.create(model, rank=2, alpha=4, **off)


@pytest.mark.parametrize(("rank", "alpha"), [(0, 8.0), (4, 0.0), (4, math.nan), (-1, 8.0)])
def test_bad_shapes(rank: int, alpha: float, base_of: Callable[[str], BaseModel]) -> None:
    with pytest.raises(ModelError, match="must be positive"):
        LoraAdapter.create(base_of("qwen3").model, rank=rank, alpha=alpha)


def test_initialisation(base_of: Callable[[str], BaseModel]) -> None:
    model = base_of("llama").model
    one, same, other = (LoraAdapter.create(model, rank=8, alpha=8, seed=s) for s in (1, 1, 2))
    for name, (a, b) in one.weights.items():
        bound = 1 / math.sqrt(a.shape[1])
        assert torch.equal(a, same.weights[name][0])
        assert not torch.equal(a, other.weights[name][0])
        assert float(a.detach().abs().max()) <= bound
        assert float(a.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.15)
        assert not b.detach().any()
    attention_only = LoraAdapter.create(model, rank=8, alpha=8, seed=1, train_mlp=False)
    assert all(torch.equal(a, one.weights[n][0]) for n, (a, _) in attention_only.weights.items())
    unseeded = [LoraAdapter.create(model, rank=8, alpha=8, seed=None) for _ in range(2)]
    assert not torch.equal(*(next(iter(u.weights.values()))[0] for u in unseeded))


def test_scale_is_alpha_over_rank(trainable: Any) -> None:
    model = trainable("llama", perturbed=True, rank=4, alpha=8.0)
    doubled = LoraAdapter(4, 16.0, {n: (a, b / 2) for n, (a, b) in model.adapter.weights.items()})
    torch.testing.assert_close(logits(model.base, doubled), logits(model.base, model.adapter), rtol=1e-5, atol=1e-5)


def test_installing_twice_applies_once(trainable: Any) -> None:
    model = trainable("llama", perturbed=True)
    before = logits(model.base, model.adapter)
    install(model.base.model)
    assert torch.equal(logits(model.base, model.adapter), before)


def test_tied_unembedding_moves_the_logits_only(trainable: Any) -> None:
    model = trainable("qwen3", perturbed=True, train_attn=False, train_mlp=False, train_unembed=True)
    base = model.base
    assert base.model.lm_head.weight is base.model.model.embed_tokens.weight
    with torch.no_grad(), applied(model.adapter):
        hidden = base.model.model(input_ids=IDS).last_hidden_state
    with torch.no_grad():
        plain = base.model.model(input_ids=IDS).last_hidden_state
    assert torch.equal(hidden, plain)
    a, b = model.adapter.weights["lm_head"]
    expected = logits(base, None) + 2.0 * (plain @ a.detach().T @ b.detach().T)
    torch.testing.assert_close(logits(base, model.adapter), expected, rtol=1e-5, atol=1e-5)


def test_contexts_nest_and_end(trainable: Any) -> None:
    models = [trainable("qwen3", seed=s, perturbed=True) for s in (1, 2)]
    base, (one, two) = models[0].base, (model.adapter for model in models)
    with_one, with_two, bare = (logits(base, adapter) for adapter in (one, two, None))
    assert len({float(each.sum()) for each in (with_one, with_two, bare)}) == 3

    def now() -> torch.Tensor:
        return base.model(input_ids=IDS).logits

    with torch.no_grad():
        with applied(one):
            with applied(two):
                assert torch.equal(now(), with_two)
                with applied(None):
                    assert torch.equal(now(), bare)
            assert torch.equal(now(), with_one)
        assert torch.equal(now(), bare)


def test_two_threads_with_different_adapters_at_once(trainable: Any) -> None:
    models = [trainable("qwen3", seed=s, perturbed=True) for s in (1, 2)]
    base = models[0].base
    expected = [logits(base, m.adapter) for m in models] + [logits(base, None)]
    assert not torch.equal(expected[0], expected[1])
    barrier = threading.Barrier(3)
    wrong: list[str] = []

    def work(index: int) -> None:
        adapter = models[index].adapter if index < 2 else None
        with applied(adapter):
            for _ in range(60):
                barrier.wait(timeout=30)  # all three enter the same modules at the same moment
                with torch.no_grad():
                    if not torch.equal(base.model(input_ids=IDS).logits, expected[index]):
                        wrong.append(f"thread {index}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not wrong


def test_training_one_adapter_leaves_others_and_snapshots_alone(trainable: Any, make_ce_datums: Any) -> None:
    trained, other = trainable("llama", seed=1, perturbed=True), trainable("llama", seed=2, perturbed=True)
    data = make_ce_datums(3)
    other.forward_backward(data, "cross_entropy")
    other.optim_step(types.AdamParams(learning_rate=1e-2))
    other.forward_backward(data, "cross_entropy")
    frozen = trained.adapter.snapshot()
    assert not any(t.requires_grad for _, t in frozen.named_tensors())
    state = [
        {n: t.detach().clone() for n, t in source.items()}
        for source in (other.parameters, other.gradient, other.optimizer.state_tensors(), other.base.model.state_dict())
    ]
    probes = [logits(trained.base, a) for a in (other.adapter, frozen, None, trained.adapter)]
    for _ in range(3):
        trained.forward_backward(data, "cross_entropy")
        trained.optim_step(types.AdamParams(learning_rate=1e-2))
    after = [logits(trained.base, a) for a in (other.adapter, frozen, None, trained.adapter)]
    assert [torch.equal(b, a) for b, a in zip(probes, after, strict=True)] == [True, True, True, False]
    sources = (other.parameters, other.gradient, other.optimizer.state_tensors(), other.base.model.state_dict())
    for kept, now in zip(state, sources, strict=True):
        assert all(torch.equal(kept[n], t) for n, t in now.items())
