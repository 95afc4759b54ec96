"""Each loss and its LoRA gradient against plain float64 autograd on a right-padded batch, with merged weights."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from computed import computed
from tinker import types
from torch import Tensor

from nat_plugin_evsys.engine.gradient.trainable import TrainableModel

TOLERANCE = 1e-5


class Reference:
    """``W + alpha / rank * B A`` put into a float64 copy of the model; one padded batch with an attention mask."""

    def __init__(self, model: TrainableModel) -> None:
        self.model = copy.deepcopy(model.base.model).double()
        if hasattr(self.model, "set_experts_implementation"):
            self.model.set_experts_implementation("eager")
        for module in self.model.modules():
            module._forward_hooks.clear()
        self.scale = model.adapter.alpha / model.adapter.rank
        self.ab = {
            name: (a.detach().double().requires_grad_(), b.detach().double().requires_grad_())
            for name, (a, b) in model.adapter.weights.items()
        }

    def logprobs(self, data: list[types.Datum]) -> Tensor:
        """[D, T, V] log-softmax."""
        sequences = [torch.tensor(d.model_input.to_ints()) for d in data]
        ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(s) for s in sequences], batch_first=True)
        weights = dict(self.model.named_parameters())
        merged = {
            f"{name}.weight": weights.get(f"{name}.weight", self.model.get_submodule(name).weight)
            + self.scale * (b @ a)
            for name, (a, b) in self.ab.items()
        }
        out = torch.func.functional_call(
            self.model, merged, kwargs={"input_ids": ids, "attention_mask": mask, "use_cache": False}, tie_weights=False
        )
        return torch.log_softmax(out.logits, dim=-1)

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        flat = {f"{n}.lora_{side}.weight": t for n, pair in self.ab.items() for side, t in zip("AB", pair, strict=True)}
        grads = torch.autograd.grad(loss, list(flat.values()))
        return dict(zip(flat, grads, strict=True))


def padded(data: list[types.Datum], key: str, width: int) -> Tensor:
    rows = [torch.tensor(d.loss_fn_inputs[key].tolist()) for d in data]
    return torch.stack([torch.nn.functional.pad(r, (0, width - len(r))) for r in rows])


def reference_loss(name: str, lp: Tensor, data: list[types.Datum], config: dict[str, float]) -> Tensor:
    """lp [D, T] of the targets, padding included (its advantages are zero)."""
    width = lp.shape[1]
    real = padded(data, "advantages", width) * 0
    for i, d in enumerate(data):
        real[i, : d.model_input.length] = 1
    adv = padded(data, "advantages", width).double()
    old = padded(data, "logprobs", width).double()
    diff = (lp - old) * real
    low, high = config.get("clip_low_threshold", 0.0), config.get("clip_high_threshold", 0.0)
    if name == "importance_sampling":
        return -(diff.exp() * adv).sum()
    if name == "ppo":
        r = diff.exp()
        return -torch.where(r * adv < r.clip(low, high) * adv, r * adv, r.clip(low, high) * adv).sum()
    if name == "cispo":
        return -(diff.exp().clip(low, high).detach() * lp * adv).sum()
    if name == "dro":
        return -((lp * adv - config["beta"] / 2 * diff**2) * real).sum()
    assert name == "gspo"
    m = (padded(data, "sequence_ratio_mask", width) != 0).double()
    s = ((diff * m).sum(1) / m.sum(1)).exp()[:, None].detach()
    st = s * (lp - lp.detach()).exp()
    return -torch.minimum(st * adv, st.clip(low, high) * adv).sum()


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


def compare(model: TrainableModel, reference: Reference, output: types.ForwardBackwardOutput, loss: Tensor) -> None:
    # A sum of terms of both signs is exact relative to the terms, not to what is left of them.
    terms = sum(float(o["elementwise_loss"].to_torch().abs().sum()) for o in output.loss_fn_outputs)
    assert abs(output.metrics["loss:sum"] - float(loss.detach())) <= TOLERANCE * max(terms, abs(float(loss.detach())))
    assert model.gradient is not None
    expected = reference.gradients(loss)
    assert set(expected) == set(model.gradient)
    worst = max(relative(model.gradient[name], g) for name, g in expected.items() if float(g.abs().max()) > 0)
    assert worst <= TOLERANCE
    assert all(float(g.abs().max()) > 0 for g in expected.values()), "the reference gradient must not be trivial"


CONFIGS: list[tuple[str, dict[str, float]]] = [
    ("importance_sampling", {}),
    ("ppo", {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}),
    ("cispo", {"clip_low_threshold": 0.5, "clip_high_threshold": 1.5}),
    ("dro", {"beta": 0.05}),
    ("gspo", {"clip_low_threshold": 0.6, "clip_high_threshold": 1.4}),
]


@pytest.mark.parametrize(("loss_fn", "config"), CONFIGS)
@pytest.mark.parametrize("seed", range(3))
def test_rl_losses_match_padded_autograd(
    loss_fn: str, config: dict[str, float], seed: int, trainable: Any, make_rl_datums: Any
) -> None:
    extra: dict[str, Any] = {}
    if loss_fn == "gspo":
        extra["sequence_ratio_mask"] = lambda n, rng: [1.0] + [rng.choice([0.0, 1.0]) for _ in range(n - 1)]
    data = make_rl_datums(seed, **extra)
    # A small budget forces several micro-batches.
    model = trainable("qwen3", seed=seed, perturbed=True, token_budget=40)
    output = model.forward_backward(data, loss_fn, config)

    reference = Reference(model)
    all_lp = reference.logprobs(data)
    targets = padded(data, "target_tokens", all_lp.shape[1])
    lp = all_lp.gather(2, targets[..., None])[..., 0]
    compare(model, reference, output, reference_loss(loss_fn, lp, data, config))

    for i, (datum, out) in enumerate(zip(data, output.loss_fn_outputs, strict=True)):
        n = datum.model_input.length
        assert out["logprobs"].shape == [n]
        torch.testing.assert_close(out["logprobs"].to_torch().double(), lp[i, :n].detach(), rtol=1e-5, atol=1e-5)
        assert out["elementwise_loss"].shape == [n]
    total = sum(float(o["elementwise_loss"].to_torch().double().sum()) for o in output.loss_fn_outputs)
    assert total == pytest.approx(output.metrics["loss:sum"], rel=1e-5)


@pytest.mark.parametrize("family", ["qwen2", "llama", "gemma2", "gemma3", "qwen3_moe", "mixtral"])
def test_importance_sampling_gradient_in_every_family(family: str, trainable: Any, make_rl_datums: Any) -> None:
    data = make_rl_datums(7)
    model = trainable(family, perturbed=True, token_budget=64, train_unembed=True)
    output = model.forward_backward(data, "importance_sampling")
    reference = Reference(model)
    all_lp = reference.logprobs(data)
    lp = all_lp.gather(2, padded(data, "target_tokens", all_lp.shape[1])[..., None])[..., 0]
    compare(model, reference, output, reference_loss("importance_sampling", lp, data, {}))


def test_cross_entropy_matches_padded_autograd(trainable: Any, make_ce_datums: Any) -> None:
    data = make_ce_datums(3)
    model = trainable("qwen3", perturbed=True, token_budget=32)
    output = model.forward_backward(data, "cross_entropy")
    reference = Reference(model)
    all_lp = reference.logprobs(data)
    width = all_lp.shape[1]
    lp = all_lp.gather(2, padded(data, "target_tokens", width)[..., None])[..., 0]
    compare(model, reference, output, -(lp * padded(data, "weights", width)).sum())


def test_soft_targets_of_unequal_width(trainable: Any) -> None:
    rng = random.Random(5)
    data = []
    for n, k in ((6, 3), (9, 5), (4, 1)):
        targets = [[rng.randrange(200) for _ in range(k)] for _ in range(n)]
        weights = [[rng.uniform(-1, 1) for _ in range(k)] for _ in range(n)]
        ids = [rng.randrange(200) for _ in range(n)]
        inputs: dict[str, Any] = {"target_tokens": targets, "weights": weights}
        data.append(types.Datum(types.ModelInput.from_ints(ids), inputs))
    data.append(types.Datum(types.ModelInput.from_ints([1, 2, 3]), {"target_tokens": [2, 3, 4]}))  # weights absent: 1
    model = trainable("llama", perturbed=True)
    output = model.forward_backward(data, "cross_entropy")

    reference = Reference(model)
    all_lp = reference.logprobs(data)
    loss = torch.zeros((), dtype=torch.float64)
    for i, d in enumerate(data[:3]):
        t = torch.tensor(d.loss_fn_inputs["target_tokens"].tolist())
        w = torch.tensor(d.loss_fn_inputs["weights"].tolist())
        loss = loss - (all_lp[i, : len(t)].gather(1, t) * w).sum()
        assert output.loss_fn_outputs[i]["logprobs"].shape == list(t.shape)
    loss = loss - all_lp[3, [0, 1, 2], [2, 3, 4]].sum()
    compare(model, reference, output, loss)


@pytest.mark.parametrize("loss_fn", ["ppo", "cispo", "gspo"])
def test_per_token_thresholds_replace_the_config(loss_fn: str, trainable: Any, make_rl_datums: Any) -> None:
    def constant(value: float) -> Any:
        return lambda n, rng: [value] * n

    mask = {"sequence_ratio_mask": constant(1.0)} if loss_fn == "gspo" else {}
    plain, per_token = (
        make_rl_datums(1, **mask, **thresholds)
        for thresholds in ({}, {"clip_low_threshold": constant(0.7), "clip_high_threshold": constant(1.1)})
    )
    model = trainable(perturbed=True)
    by_config = model.forward(plain, loss_fn, {"clip_low_threshold": 0.7, "clip_high_threshold": 1.1})
    by_token = model.forward(per_token, loss_fn, {"clip_low_threshold": 0.0, "clip_high_threshold": 9.0})
    by_default = model.forward(plain, loss_fn)
    assert computed(by_token.metrics) == computed(by_config.metrics)
    assert by_token.metrics["loss:sum"] != by_default.metrics["loss:sum"]


def test_metrics_against_hand_computation(trainable: Any, make_rl_datums: Any) -> None:
    data = make_rl_datums(11)
    model = trainable(perturbed=True)
    metrics = model.forward(data, "ppo").metrics
    reference = Reference(model)
    all_lp = reference.logprobs(data).detach()
    ratios, entropies, clipped = [], [], 0
    for i, d in enumerate(data):
        for t, (target, q, adv) in enumerate(
            zip(*(d.loss_fn_inputs[k].tolist() for k in ("target_tokens", "logprobs", "advantages")), strict=True)
        ):
            if adv != 0:
                r = float((all_lp[i, t, target] - q).exp())
                ratios.append(r)
                clipped += (adv > 0 and r > 1.2) or (adv < 0 and r < 0.8)
                entropies.append(-float((all_lp[i, t].exp() * all_lp[i, t]).sum()))
    logs = torch.tensor(ratios).log()
    assert metrics["tokens:sum"] == len(ratios)
    assert metrics["ratio:mean"] == pytest.approx(sum(ratios) / len(ratios), rel=1e-4)
    assert metrics["ratio:max"] == pytest.approx(max(ratios), rel=1e-4)
    assert metrics["clip_fraction:mean"] == pytest.approx(clipped / len(ratios), rel=1e-6)
    assert metrics["kl_v1:mean"] == pytest.approx(-float(logs.mean()), rel=1e-4)
    assert metrics["kl_v2:mean"] == pytest.approx(float((logs**2).mean() / 2), rel=1e-4)
    assert metrics["entropy:mean"] == pytest.approx(sum(entropies) / len(entropies), rel=1e-4)
    assert all(":" in key for key in metrics)


def test_accumulation_is_the_gradient_of_the_sum(trainable: Any, make_ce_datums: Any) -> None:
    data: list[types.Datum] = make_ce_datums(2, 6)
    once, twice = trainable(perturbed=True), trainable(perturbed=True)
    once.forward_backward(data, "cross_entropy")
    twice.forward_backward(data[:2], "cross_entropy")
    twice.forward_backward(data[2:], "cross_entropy")
    for name, g in once.gradient.items():
        assert relative(twice.gradient[name], g.double()) < TOLERANCE


def test_row_chunks_do_not_change_the_result(
    trainable: Any, make_rl_datums: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_rl_datums(4)
    whole, chunked = trainable(perturbed=True), trainable(perturbed=True)
    expected = whole.forward_backward(data, "ppo")
    monkeypatch.setattr("nat_plugin_evsys.engine.model.forward.CHUNK_ELEMENTS", 3 * 200)
    found = chunked.forward_backward(data, "ppo")
    assert found.metrics["loss:sum"] == pytest.approx(expected.metrics["loss:sum"], rel=1e-6)
    for name, g in whole.gradient.items():
        assert relative(chunked.gradient[name], g.double()) < TOLERANCE


def custom(data: list[types.Datum], logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    means = torch.stack([lp.mean() for lp in logprobs])
    return (means**2).sum() + means.prod(), {"mean_lp": float(means.detach().mean())}


def test_custom_loss_is_exact(trainable: Any, make_ce_datums: Any) -> None:
    data = make_ce_datums(9, 3)
    model = trainable(perturbed=True, token_budget=24)
    seen: list[tuple[int, int]] = []
    output = model.forward_backward_custom(data, custom, lambda done, total: seen.append((done, total)))

    reference = Reference(model)
    all_lp = reference.logprobs(data)
    lps = [
        all_lp[i, : d.model_input.length].gather(1, torch.tensor(d.loss_fn_inputs["target_tokens"].tolist())[:, None])
        for i, d in enumerate(data)
    ]
    loss, metrics = custom(data, lps)
    compare(model, reference, output, loss)
    assert output.metrics["loss:sum"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert output.metrics["mean_lp"] == pytest.approx(metrics["mean_lp"], rel=1e-5)
    assert "surrogate_loss:sum" in output.metrics
    done = [d for d, _ in seen]
    assert done == sorted(done)
    assert seen[-1][0] == seen[-1][1]


def test_progress_grows_to_the_total(trainable: Any, make_ce_datums: Any) -> None:
    seen: list[tuple[int, int]] = []
    data: list[types.Datum] = make_ce_datums(1, 8)
    report: Callable[[int, int], None] = lambda done, total: seen.append((done, total))  # noqa: E731
    trainable(token_budget=30).forward_backward(data, "cross_entropy", progress=report)
    total = sum(d.model_input.length for d in data)
    assert len(seen) > 2
    assert [d for d, _ in seen] == sorted({d for d, _ in seen})
    assert seen[-1] == (total, total)
