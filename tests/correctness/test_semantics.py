"""What the engine promises beside its numbers: sums, all-or-nothing, refusals before compute, metrics, versions."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch
from computed import computed
from plain_reference import PlainModel, double_leaves
from tinker import types
from tiny import CONTEXT, VOCAB, perturb

from nat_plugin_evsys.backends.local import LocalBackend
from nat_plugin_evsys.engine.gradient.losses import LOSSES
from nat_plugin_evsys.engine.gradient.trainable import TrainableModel
from nat_plugin_evsys.engine.model.lora import LoraAdapter
from nat_plugin_evsys.errors import ConfigError, DataError, NonFiniteGradientError

ROUNDING = 1e-6
ADAM = types.AdamParams(learning_rate=1e-2)
RL = ["importance_sampling", "ppo", "cispo", "dro", "gspo"]


def datum(loss_fn: str, rng: random.Random, n: int = 9, prompt: int = 3, **inputs: Any) -> types.Datum:
    """A random Datum for ``loss_fn``; ``inputs`` replace or add to what it has."""
    values: dict[str, Any] = {"target_tokens": [rng.randrange(VOCAB) for _ in range(n)]}
    sampled = [float(t >= prompt) for t in range(n)]
    if loss_fn == "cross_entropy":
        values["weights"] = sampled
    else:
        values["logprobs"] = [rng.uniform(-7, -4) * s for s in sampled]
        values["advantages"] = [rng.uniform(-1, 1) * s for s in sampled]
        if loss_fn == "gspo":
            values["sequence_ratio_mask"] = sampled
    model_input = types.ModelInput.from_ints([rng.randrange(VOCAB) for _ in range(n)])
    with np.errstate(over="ignore"):  # 1e39 becomes inf, which is what a test wants
        return types.Datum(model_input, {**values, **inputs})


def batch(loss_fn: str, seed: int = 0, count: int = 4) -> list[types.Datum]:
    rng = random.Random(seed)
    return [datum(loss_fn, rng, n=rng.randrange(5, 14)) for _ in range(count)]


@pytest.fixture
def make_model(base_of: Callable[[str], Any]) -> Callable[..., TrainableModel]:
    """``make_model(token_budget=…)`` over Qwen3 with a perturbed adapter, the same each time."""

    def make(token_budget: int | None = None) -> TrainableModel:
        base = base_of("qwen3")
        adapter = perturb(LoraAdapter.create(base.model, rank=4, alpha=8.0))
        return TrainableModel(base, adapter, token_budget=token_budget)

    return make


def state(model: TrainableModel) -> dict[str, torch.Tensor]:
    """Everything that an operation could change."""
    parts = {"weights": model.parameters, "gradient": model.gradient or {}, "moments": model.optimizer.state_tensors()}
    return {f"{part}.{name}": t.detach().clone() for part, tensors in parts.items() for name, t in tensors.items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def watched(loss_fn: str) -> set[str]:
    """Metrics that a loss must give."""
    expected = {"loss:sum", "tokens:sum", "entropy:mean"}
    if loss_fn == "cross_entropy":
        return expected | {"weights:sum"}
    clip = {"clip_fraction:mean"} if loss_fn in ("ppo", "cispo", "gspo") else set()
    return expected | clip | {"ratio:mean", "ratio:max", "kl_v1:mean", "kl_v2:mean"}


# -- losses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_fn", list(LOSSES))
def test_loss_and_gradient_are_sums_over_datums(loss_fn: str, make_model: Any) -> None:
    """A Datum adds the same whatever it is batched with; twice the Datums are twice the loss and the gradient."""
    data = batch(loss_fn)
    whole, doubled = make_model(), make_model()
    output = whole.forward_backward(data, loss_fn)
    alone = [make_model().forward_backward([d], loss_fn).metrics["loss:sum"] for d in data]
    scale = sum(abs(loss) for loss in alone)
    assert abs(output.metrics["loss:sum"] - sum(alone)) <= 1e-5 * scale
    twice = doubled.forward_backward([*data, *reversed(data)], loss_fn)
    assert abs(twice.metrics["loss:sum"] - 2 * sum(alone)) <= 2e-5 * scale
    assert twice.metrics["tokens:sum"] == 2 * output.metrics["tokens:sum"]
    for name, gradient in whole.gradient.items():
        torch.testing.assert_close(doubled.gradient[name], 2 * gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("loss_fn", list(LOSSES))
def test_forward_is_forward_backward_without_the_gradient(loss_fn: str, make_model: Any) -> None:
    model = make_model()
    before = state(model)
    forward = model.forward(batch(loss_fn), loss_fn)
    assert equal(state(model), before)
    assert model.gradient is None
    both = model.forward_backward(batch(loss_fn), loss_fn)
    for key in watched(loss_fn):
        assert both.metrics[key] == pytest.approx(forward.metrics[key], rel=1e-5, abs=1e-5)
    for one, other in zip(forward.loss_fn_outputs, both.loss_fn_outputs, strict=True):
        assert one.keys() == other.keys() == {"logprobs", "elementwise_loss"}
        torch.testing.assert_close(one["logprobs"].to_torch(), other["logprobs"].to_torch(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("loss_fn", list(LOSSES))
def test_metrics_that_an_rl_user_watches_are_there(loss_fn: str, make_model: Any) -> None:
    metrics = make_model().forward_backward(batch(loss_fn), loss_fn).metrics
    assert watched(loss_fn) <= set(metrics)
    assert all(key.count(":") == 1 for key in metrics), "Tinker's client splits every name at its colon"
    assert all(math.isfinite(value) for value in metrics.values())
    assert 0 < metrics["entropy:mean"] <= math.log(VOCAB)


@pytest.mark.parametrize("loss_fn", ["importance_sampling", "ppo", "cispo"])
def test_what_a_masked_row_carries_as_logprob_does_not_matter(loss_fn: str, make_model: Any) -> None:
    """-99999 is Tinker's own placeholder; its ratio is beyond float32, and 0 * inf would be NaN."""
    rng = random.Random(3)
    plain = datum(loss_fn, rng)
    masked = [-99999.0 if a == 0 else q for a, q in zip(*(plain.loss_fn_inputs[k].tolist() for k in ("advantages", "logprobs")), strict=True)]  # fmt: skip  # noqa: E501
    odd = types.Datum(plain.model_input, {**plain.loss_fn_inputs, "logprobs": masked})  # type: ignore[arg-type]
    one, other = make_model(), make_model()
    expected, found = one.forward_backward([plain], loss_fn), other.forward_backward([odd], loss_fn)
    assert computed(found.metrics) == computed(expected.metrics)
    assert math.isfinite(found.metrics["loss:sum"])
    elementwise = [o.loss_fn_outputs[0]["elementwise_loss"].tolist() for o in (expected, found)]
    assert elementwise[0] == elementwise[1]
    assert equal(state(one), state(other))


def test_a_failure_between_micro_batches_adds_no_gradient(make_model: Any) -> None:
    model = make_model(token_budget=20)
    model.forward_backward(batch("ppo", 1), "ppo")
    before = state(model)

    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.forward_backward(batch("ppo", 2, count=8), "ppo", progress=stop)
    assert equal(state(model), before)


# -- refused before any compute ---------------------------------------------------------------------------------------

R = random.Random(0)
THRESHOLDS = {"clip_low_threshold": [2.0] * 9}
REFUSED: list[tuple[str, list[Any], dict[str, Any] | None, type[Exception], str]] = [
    ("nope", [datum("ppo", R)], None, DataError, "unknown"),
    ("ppo", [datum("cross_entropy", R)], None, DataError, "lacks 'logprobs'"),
    ("cross_entropy", [datum("ppo", R)], None, DataError, "does not take"),
    ("ppo", [datum("ppo", R), datum("ppo", R, advantages=[1.0])], None, DataError, r"data\[1\]: advantages"),
    ("ppo", [datum("ppo", R, advantages=[math.nan] * 9)], None, DataError, "is nan"),
    ("ppo", [datum("ppo", R, logprobs=[-math.inf] * 9)], None, DataError, "is -inf"),
    ("cross_entropy", [datum("cross_entropy", R, weights=[1e39] * 9)], None, DataError, "is inf"),
    ("ppo", [datum("ppo", R, target_tokens=[VOCAB] * 9)], None, DataError, "token ids are 0 to 199"),
    ("ppo", [datum("ppo", R, target_tokens=[-1] * 9)], None, DataError, "is -1"),
    ("ppo", [datum("ppo", R, n=CONTEXT + 1)], None, DataError, f"{CONTEXT + 1} tokens.*length is {CONTEXT}"),
    ("ppo", [datum("ppo", R)], {"epsilon": 0.2}, ConfigError, "unknown key 'epsilon'"),
    ("dro", [datum("dro", R)], {"beta": math.nan}, ConfigError, "beta is nan"),
    ("ppo", [datum("ppo", R, clip_high_threshold=[math.nan] * 9)], None, DataError, "is nan"),
    ("ppo", [datum("ppo", R, clip_low_threshold=[-0.5] * 9)], None, DataError, "never below 0"),
    ("ppo", [datum("ppo", R, **THRESHOLDS)], None, DataError, "2 is above clip_high_threshold 1.2 at 0"),
    ("cispo", [datum("cispo", R, **THRESHOLDS)], {"clip_high_threshold": 1.5}, DataError, "2 is above .* 1.5"),
    ("gspo", [datum("gspo", R, sequence_ratio_mask=[0.0] * 9)], None, DataError, "zero everywhere"),
]


@pytest.mark.parametrize(("loss_fn", "data", "config", "error", "message"), REFUSED)
def test_bad_data_is_refused_before_any_compute(
    loss_fn: str, data: list[Any], config: dict[str, Any] | None, error: type[Exception], message: str, make_model: Any
) -> None:
    model = make_model()
    model.forward_backward(batch("ppo"), "ppo")
    model.optim_step(ADAM)
    model.forward_backward(batch("ppo"), "ppo")
    before, passes = state(model), []
    handles = [
        module.register_forward_pre_hook(lambda *_: passes.append(1))
        for module in (model.base.model, model.base.model.get_decoder(), model.base.model.get_input_embeddings())
    ]
    try:
        for call in (model.forward_backward, model.forward):
            with pytest.raises(error, match=message):
                call(data, loss_fn, config)
        assert not passes, "the model must not have run"
        assert equal(state(model), before)
        model.forward(batch("ppo"), "ppo")
        assert passes, "the hooks must see a forward pass"
    finally:
        for handle in handles:
            handle.remove()


# -- optimizer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e25])
def test_a_step_that_would_leave_no_finite_moments_is_refused(bad: float, make_model: Any) -> None:
    """1e25 is finite, its square is not: AdamW's second moment would hold an inf from then on."""
    model = make_model()
    for _ in range(2):
        model.forward_backward(batch("ppo"), "ppo")
        model.optim_step(ADAM)
    before = state(model)
    model.forward_backward(batch("ppo"), "ppo")
    next(iter(model.gradient.values()))[0, 0] = bad
    with pytest.raises(NonFiniteGradientError, match="weights and moments are unchanged"):
        model.optim_step(ADAM)
    assert equal(state(model), before)
    assert (model.step, model.gradient) == (2, None)
    model.forward_backward(batch("ppo"), "ppo")
    assert model.optim_step(ADAM).metrics["step"] == 3


def test_clipping_brings_a_huge_gradient_back(make_model: Any) -> None:
    model = make_model()
    model.forward_backward(batch("ppo"), "ppo")
    next(iter(model.gradient.values()))[0, 0] = 1e25
    metrics = model.optim_step(types.AdamParams(learning_rate=1e-3, grad_clip_norm=1.0)).metrics
    assert metrics["grad_norm"] == pytest.approx(1e25, rel=1e-6)
    assert all(bool(torch.isfinite(t).all()) for t in state(model).values())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"eps": 0.0}, "eps is 0.0; expected at least"),
        ({"eps": 1e-60}, "eps is 1e-60"),
        ({"learning_rate": 1e39}, "learning_rate is 1e[+]39; expected at most"),
        ({"weight_decay": 1e39}, "weight_decay"),
    ],
)
def test_values_that_would_make_nan_or_overflow_are_refused(
    values: dict[str, float], message: str, base_of: Any
) -> None:
    """A fresh adapter's A has no gradient yet (B is zero): with eps 0 its first update would be 0 / 0."""
    base = base_of("qwen3")
    model = TrainableModel(base, LoraAdapter.create(base.model, rank=4, alpha=8.0))
    model.forward_backward(batch("cross_entropy"), "cross_entropy")
    before = state(model)
    with pytest.raises(ConfigError, match=message):
        model.optim_step(types.AdamParams(**values))
    assert equal(state(model), before)
    model.optim_step(ADAM)
    assert all(bool(torch.isfinite(t).all()) for t in state(model).values())


# -- sampling ---------------------------------------------------------------------------------------------------------


@pytest_asyncio.fixture
async def backend(base_of: Callable[[str], Any], tmp_path: Path) -> Any:
    """A backend over Qwen3 with a perturbed adapter."""
    base = base_of("qwen3")
    made = LocalBackend(base, perturb(LoraAdapter.create(base.model, rank=4, alpha=8.0)), checkpoint_dir=tmp_path)
    yield made
    await made.close()


def kept_distribution(
    row: torch.Tensor, known: Iterable[int], temperature: float, top_k: int, top_p: float
) -> dict[int, float]:
    """The rule as docs state it, one token after the other: temperature, then top_k, then top_p, renormalised.

    Only ids that the tokenizer has (``known``) take part.
    """
    probs = (row / temperature).softmax(-1).tolist()
    order = sorted(known, key=lambda i: (-probs[i], i))
    if top_k > 0:
        order = order[:top_k]
    total, mass, kept = sum(probs[i] for i in order), 0.0, []
    for i in order:
        if kept and mass >= top_p:
            break
        kept.append(i)
        mass += probs[i] / total
    share = sum(probs[i] for i in kept)
    return {i: probs[i] / share for i in kept}


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(0.5, 7, 1.0), (1.5, -1, 0.7), (1.0, 20, 0.5), (0.8, 50, 0.9), (1.0, 0, 0.0), (1.2, 1, 0.3)],
)
async def test_logprobs_are_those_of_the_distribution_that_was_sampled(
    temperature: float, top_k: int, top_p: float, backend: LocalBackend, plain_of: Any, measured: Any
) -> None:
    adapter = backend._model.adapter
    plain: PlainModel = plain_of("qwen3")
    client = await backend.snapshot_sampling_client()
    prompt = [3, 14, 15, 92, 65]
    known = set(backend.get_tokenizer().get_vocab().values())
    params = types.SamplingParams(max_tokens=24, temperature=temperature, top_k=top_k, top_p=top_p, seed=5, stop=[])
    result = await client.sample_async(types.ModelInput.from_ints(prompt), 4, params)
    worst, count = 0.0, 0
    for sequence in result.sequences:
        with torch.no_grad():
            rows = plain.log_softmax([prompt + sequence.tokens], double_leaves(adapter.weights), 2.0)[0]
        for t, (token, logprob) in enumerate(zip(sequence.tokens, sequence.logprobs or [], strict=True)):
            # Where the sum of the likeliest lies on top_p, its last bit decides whether one more is kept.
            row, borders = rows[len(prompt) - 1 + t], {top_p - ROUNDING, top_p, top_p + ROUNDING}
            rules = [kept_distribution(row, known, temperature, top_k, border) for border in borders]
            gaps = [abs(logprob - math.log(kept[token])) for kept in rules if token in kept]
            assert gaps, "a token that the rule drops was sampled"
            worst, count = max(worst, min(gaps)), count + 1
    subject = f"T = {temperature:g}, top_k = {top_k}, top_p = {top_p:g}"
    measured(
        "2 sampler and trainer", "sampler vs the stated rule of top_k and top_p, plain float64", subject,
        worst=worst, bound=1e-5, tokens=count,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("num_samples", "params", "message"),
    [
        (2.5, {}, "num_samples must be a whole number"),
        (1, {"temperature": 1e-40}, "too small to divide logits by; give 0 for greedy"),
    ],
)
async def test_what_cannot_be_sampled_is_refused_by_name(
    num_samples: Any, params: dict[str, Any], message: str, backend: LocalBackend
) -> None:
    client = await backend.snapshot_sampling_client()
    prompt = types.ModelInput.from_ints([1, 2, 3])
    wanted = types.SamplingParams(max_tokens=2, stop=[], **params)
    with pytest.raises(DataError, match=message):
        await asyncio.wait_for(client.sample_async(prompt, num_samples, wanted), 30)
    good = await client.sample_async(prompt, 1, types.SamplingParams(max_tokens=2, stop=[]))
    assert len(good.sequences[0].tokens) == 2


async def test_a_sequence_keeps_its_version_while_new_ones_are_published(backend: LocalBackend, plain_of: Any) -> None:
    """A long sequence is under way while steps are taken and versions published: all of it is the version it says."""
    plain: PlainModel = plain_of("qwen3")
    old = double_leaves(backend._model.adapter.weights)
    first = await backend.snapshot_sampling_client()
    began = asyncio.Event()
    loop = asyncio.get_running_loop()
    prompt = [9, 8, 7, 6]
    params = types.SamplingParams(max_tokens=120, seed=1, stop=[])

    def on_tokens(*_: Any) -> None:
        loop.call_soon_threadsafe(began.set)

    running = asyncio.create_task(
        first.sample_async(types.ModelInput.from_ints(prompt), 2, params, on_tokens=on_tokens)
    )
    await asyncio.wait_for(began.wait(), 60)
    for step in range(3):
        await backend.forward_backward_async(batch("cross_entropy", step), loss_fn="cross_entropy")
        await backend.optim_step_async(ADAM)
        newest = await backend.snapshot_sampling_client()
    assert not running.done(), "the sequence must still have been under way"
    late = await newest.sample_async(types.ModelInput.from_ints(prompt), 1, params)
    result = await running
    assert (result.policy_version, late.policy_version) == (0, 3)
    new = double_leaves(backend._model.adapter.weights)
    for matrices, sequence in ((old, result.sequences[0]), (old, result.sequences[1]), (new, late.sequences[0])):
        with torch.no_grad():
            rows = plain.log_softmax([prompt + sequence.tokens], matrices, 2.0)[0][len(prompt) - 1 : -1]
        want = rows.gather(1, torch.tensor(sequence.tokens)[:, None])[:, 0]
        assert float((torch.tensor(list(sequence.logprobs or [])) - want).abs().max()) <= 1e-5


async def test_sampling_does_not_wait_for_the_training_queue(backend: LocalBackend) -> None:
    client = await backend.snapshot_sampling_client()
    rng = random.Random(0)
    big = [datum("cross_entropy", rng, n=150) for _ in range(40)]
    queued = [backend.forward_backward_async(big, loss_fn="cross_entropy") for _ in range(12)]
    result = await client.sample_async(
        types.ModelInput.from_ints([1, 2, 3]), 1, types.SamplingParams(max_tokens=5, seed=0, stop=[])
    )
    assert len(result.sequences[0].tokens) == 5
    assert not queued[-1].done(), "the training job must still have been running"
    for future in queued:
        future.cancel()
