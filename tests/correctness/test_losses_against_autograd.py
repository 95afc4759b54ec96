"""Every loss and its gradient equal an independent float64 computation, on random ragged batches."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from plain_reference import Matrices, PlainModel, double_leaves, gradients, padded
from tinker import types
from tiny import PROVED, VOCAB, perturb
from torch import Tensor

from nat_plugin_evsys.engine.gradient.losses import LOSSES
from nat_plugin_evsys.engine.gradient.trainable import TrainableModel
from nat_plugin_evsys.engine.model.lora import LoraAdapter
from nat_plugin_evsys.loss_config import LOSS_FN_CONFIGS

TOLERANCE = 1e-5
RL_LOSSES = ["importance_sampling", "ppo", "cispo", "dro", "gspo"]
CLIPPED = {"ppo", "cispo", "gspo"}
PROPERTY = settings(
    max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@dataclass
class Batch:
    """A ragged batch before it becomes Datums; ``inputs[key][i]`` is the row of sequence i."""

    family: str
    adapter_seed: int
    unembed: bool
    budget: int
    path: Literal["auto", "plain"]
    tokens: list[list[int]]
    inputs: dict[str, list[Tensor]]
    config: dict[str, float]

    def datums(self) -> list[types.Datum]:
        return [
            types.Datum(
                types.ModelInput.from_ints(ids),
                {key: types.TensorData.from_torch(rows[i]) for key, rows in self.inputs.items()},
            )
            for i, ids in enumerate(self.tokens)
        ]

    def padded(self, key: str) -> Tensor:
        return padded(self.inputs[key], max(map(len, self.tokens)))


@st.composite
def shapes(draw: Any, salt: str) -> tuple[Batch, random.Random]:
    """Lengths, family, path, LoRA roles and the cut into micro-batches; the numbers come from the seed and the salt."""
    lengths = draw(st.lists(st.integers(1, 24), min_size=1, max_size=5))
    rng = random.Random(f"{salt} {draw(st.integers(0, 2**32 - 1))}")
    # Computing shared beginnings once is a fast path that these batches must meet.
    common = [rng.randrange(VOCAB) for _ in range(draw(st.sampled_from([0, 3, 16])))]
    batch = Batch(
        family=draw(st.sampled_from(list(PROVED))),
        adapter_seed=draw(st.integers(0, 99)),
        unembed=draw(st.booleans()),
        budget=draw(st.sampled_from([1, 40, 10_000])),
        path=draw(st.sampled_from(["auto", "plain"])),
        tokens=[[*common[:n], *(rng.randrange(VOCAB) for _ in range(n - len(common)))] for n in lengths],
        inputs={},
        config={},
    )
    return batch, rng


class Bench:
    """The engine's model and the plain one with the same adapter."""

    def __init__(self, batch: Batch, base_of: Callable[[str], Any], plain_of: Callable[[str], PlainModel]) -> None:
        base = base_of(batch.family)
        adapter = LoraAdapter.create(
            base.model, rank=3, alpha=5.0, seed=batch.adapter_seed, train_unembed=batch.unembed
        )
        self.model = TrainableModel(
            base, perturb(adapter, batch.adapter_seed), token_budget=batch.budget, path=batch.path
        )
        self.matrices: Matrices = double_leaves(adapter.weights)
        self.all_lp = plain_of(batch.family).log_softmax(batch.tokens, self.matrices, 5.0 / 3)


class Tally:
    """Worst deviations over the examples of one property."""

    def __init__(self) -> None:
        self.examples = self.tokens = 0
        self.logprob = self.loss = self.gradient = self.matrix = 0.0

    def compare(
        self, bench: Bench, output: types.ForwardBackwardOutput, lp: list[Tensor], loss: Tensor, size: Tensor
    ) -> None:
        """``lp``: expected logprobs per Datum. ``size``: the sum of the loss terms' magnitudes."""
        for out, expected in zip(output.loss_fn_outputs, lp, strict=True):
            found = out["logprobs"].to_torch()
            assert found.shape == expected.shape == out["elementwise_loss"].to_torch().shape
            self.logprob = max(self.logprob, float((found - expected.detach()).abs().max()))
            self.tokens += len(found)
        total = sum(float(o["elementwise_loss"].to_torch().double().sum()) for o in output.loss_fn_outputs)
        # A sum of terms of both signs is exact relative to the terms, not to what cancellation leaves of them.
        scale = max(float(size.detach()), 1e-12)
        for found_loss in (output.metrics["loss:sum"], total):
            self.loss = max(self.loss, abs(found_loss - float(loss.detach())) / scale)
        assert bench.model.gradient is not None
        if not loss.requires_grad or float(size.detach()) == 0.0:
            assert not any(g.any() for g in bench.model.gradient.values()), "nothing is trained on: no gradient"
        else:
            self._compare_gradients(bench.model.gradient, gradients(loss, bench.matrices))
        self.examples += 1

    def _compare_gradients(self, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
        """The whole gradient as one vector (2-norm), and each matrix by its largest entry.

        Float32 cannot resolve a matrix with next to no gradient beside the others: below a hundredth of the whole
        gradient's largest entry, that hundredth is the scale. For one that has none at all (the query of a token that
        sees a single key), it is that largest entry itself.
        """
        assert found.keys() == expected.keys()
        largest = max(float(g.abs().max()) for g in expected.values())
        if largest == 0.0:  # every ratio is clipped
            assert not any(g.any() for g in found.values())
            return
        gaps = {name: found[name] - wanted for name, wanted in expected.items()}
        self.gradient = max(self.gradient, norm(gaps) / norm(expected))
        for name, wanted in expected.items():
            own = float(wanted.abs().max())
            scale = max(own, 1e-2 * largest) if own > 1e-12 * largest else largest
            self.matrix = max(self.matrix, float(gaps[name].abs().max()) / scale)

    def report(self, measured: Callable[..., None], loss_fn: str) -> None:
        assert self.examples >= 30
        figures = {
            "logprobs (absolute)": self.logprob,
            "loss (relative)": self.loss,
            "gradient, 2-norm (relative)": self.gradient,
            "gradient of each LoRA matrix (relative)": self.matrix,
        }
        for compared, worst in figures.items():
            measured(
                "1 losses", compared, loss_fn,
                worst=worst, bound=TOLERANCE, batches=self.examples, tokens=self.tokens,
            )  # fmt: skip


def norm(tensors: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float(t.square().sum()) for t in tensors.values()))


def fill_rl(batch: Batch, rng: random.Random, loss_fn: str, lp: Tensor) -> None:
    """Prompt rows (advantage 0), sampled rows with ratios around 1, thresholds from config or per token."""
    spread = rng.choice([0.1, 0.5, 1.5])
    rows: dict[str, list[Tensor]] = {key: [] for key in ("logprobs", "advantages", "mask")}
    for i, ids in enumerate(batch.tokens):
        n = len(ids)
        prompt = rng.randrange(n)
        old = lp[i, :n].detach() + torch.tensor([rng.gauss(0, spread) for _ in range(n)])
        old[:prompt] = 0.0
        advantages = [0.0 if t < prompt or rng.random() < 0.1 else rng.uniform(-2, 2) for t in range(n)]
        rows["logprobs"].append(old.float())
        rows["advantages"].append(torch.tensor(advantages))
        rows["mask"].append(torch.tensor([float(t >= prompt) for t in range(n)]))
    batch.inputs |= {"logprobs": rows["logprobs"], "advantages": rows["advantages"]}
    if loss_fn == "gspo":
        batch.inputs["sequence_ratio_mask"] = rows["mask"]
    if loss_fn == "dro":
        batch.config = {"beta": rng.choice([0.0, 0.05, 0.7])}
    if loss_fn in CLIPPED:
        for key, (least, most) in {"clip_low_threshold": (0.0, 1.0), "clip_high_threshold": (1.0, 2.0)}.items():
            how = rng.choice(["default", "config", "token"])
            if how == "config":
                batch.config[key] = rng.uniform(least, most)
            elif how == "token":
                batch.inputs[key] = [torch.tensor([rng.uniform(least, most) for _ in ids]) for ids in batch.tokens]


def expected_rl(loss_fn: str, batch: Batch, lp: Tensor) -> tuple[Tensor, float]:
    """Elementwise loss ``[D, T]`` of a padded batch, and how near a ratio comes to a threshold."""
    real = padded([torch.ones(len(ids)) for ids in batch.tokens], lp.shape[1])
    adv, gap = batch.padded("advantages"), (lp - batch.padded("logprobs")) * real
    if loss_fn == "importance_sampling":
        return -gap.exp() * adv, 1.0
    if loss_fn == "dro":
        return -(lp * adv - batch.config["beta"] / 2 * gap**2) * real, 1.0
    defaults = {"ppo": (0.8, 1.2), "cispo": (0.0, 4.0), "gspo": (1 - 3e-4, 1 + 4e-4)}[loss_fn]
    low, high = (
        batch.padded(key) if key in batch.inputs else torch.full_like(lp, batch.config.get(key, default))
        for key, default in zip(("clip_low_threshold", "clip_high_threshold"), defaults, strict=True)
    )
    ratio = gap.exp()
    if loss_fn == "gspo":
        mask = batch.padded("sequence_ratio_mask")
        mean = (gap * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
        ratio = mean.exp().detach() * (lp - lp.detach()).exp()
    active = (adv != 0) & (real != 0)
    margin = torch.stack([(ratio - low).abs(), (ratio - high).abs()]).detach()[:, active]
    clipped = torch.where(ratio < low, low, torch.where(ratio > high, high, ratio))
    if loss_fn == "cispo":
        loss = -clipped.detach() * lp * adv
    else:
        loss = -torch.where(ratio * adv < clipped * adv, ratio * adv, clipped * adv)
    return loss, float(margin.min()) if margin.numel() else 1.0


@pytest.mark.parametrize("loss_fn", RL_LOSSES)
def test_rl_losses(loss_fn: str, base_of: Any, plain_of: Any, measured: Any) -> None:
    tally = Tally()

    @PROPERTY
    @given(shapes(loss_fn))
    def check(drawn: tuple[Batch, random.Random]) -> None:
        batch, rng = drawn
        bench = Bench(batch, base_of, plain_of)
        batch.inputs["target_tokens"] = [torch.tensor([rng.randrange(VOCAB) for _ in ids]) for ids in batch.tokens]
        lp = bench.all_lp.gather(2, batch.padded("target_tokens")[..., None])[..., 0]
        fill_rl(batch, rng, loss_fn, lp)
        elementwise, margin = expected_rl(loss_fn, batch, lp)
        assume(margin > 1e-5)  # the gradient jumps at a threshold
        output = bench.model.forward_backward(batch.datums(), loss_fn, batch.config)
        expected_lp = [lp[i, : len(ids)] for i, ids in enumerate(batch.tokens)]
        tally.compare(bench, output, expected_lp, elementwise.sum(), elementwise.abs().sum())

    check()
    tally.report(measured, loss_fn)


@pytest.mark.parametrize("soft", [False, True])
def test_cross_entropy(soft: bool, base_of: Any, plain_of: Any, measured: Any) -> None:
    """(N,) targets, and (N, K) soft targets whose K differs from Datum to Datum; weights of any sign, some zero."""
    tally = Tally()

    @PROPERTY
    @given(shapes("soft" if soft else "hard"), st.lists(st.integers(1, 6), min_size=5, max_size=5))
    def check(drawn: tuple[Batch, random.Random], widths: list[int]) -> None:
        batch, rng = drawn
        bench = Bench(batch, base_of, plain_of)
        widths = widths if soft else [1] * 5
        shape = [(len(ids), widths[i]) for i, ids in enumerate(batch.tokens)]
        targets = [torch.tensor([[rng.randrange(VOCAB) for _ in range(k)] for _ in range(n)]) for n, k in shape]
        choices = (0.0, 1.0, None)
        weights = [
            torch.tensor([[rng.uniform(-1, 1) if (c := rng.choice(choices)) is None else c for _ in r] for r in t])
            for t in targets
        ]
        lp = [bench.all_lp[i, : len(t)].gather(1, t) for i, t in enumerate(targets)]
        terms = [one * w.double() for one, w in zip(lp, weights, strict=True)]
        if not soft:
            targets, weights, lp = ([t[:, 0] for t in rows] for rows in (targets, weights, lp))
        batch.inputs = {"target_tokens": targets, "weights": weights}
        output = bench.model.forward_backward(batch.datums(), "cross_entropy")
        loss = -torch.stack([t.sum() for t in terms]).sum()
        tally.compare(bench, output, lp, loss, torch.stack([t.abs().sum() for t in terms]).sum())

    check()
    tally.report(measured, f"cross_entropy {'(N, K)' if soft else '(N,)'}")


def by_hand(
    loss_fn: str, lp: np.ndarray, x: dict[str, np.ndarray], config: dict[str, float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """``(loss, its derivative by lp, size of the terms, least distance of a ratio to a threshold)``, each (N,)."""
    if loss_fn == "cross_entropy":
        return -lp * x["weights"], -x["weights"], abs(lp * x["weights"]), 1.0
    adv, gap = x["advantages"], lp - x["logprobs"]
    ratio = np.exp(gap)
    if loss_fn == "importance_sampling":
        return -ratio * adv, -ratio * adv, abs(ratio * adv), 1.0
    if loss_fn == "dro":
        beta = config["beta"]
        loss, size = -lp * adv + beta / 2 * gap**2, abs(lp * adv) + beta / 2 * gap**2
        return loss, -adv + beta * gap, np.maximum(size, abs(adv) + beta * abs(gap)), 1.0
    low, high = config["clip_low_threshold"], config["clip_high_threshold"]
    if loss_fn == "gspo":
        ratio = np.full_like(gap, np.exp(gap[x["sequence_ratio_mask"] != 0].mean()))
    margin = float(min(abs(ratio - low).min(), abs(ratio - high).min()))
    clipped = np.clip(ratio, low, high)
    if loss_fn == "cispo":
        return -clipped * lp * adv, -clipped * adv, abs(clipped * adv) * np.maximum(abs(lp), 1), margin
    loss = -np.minimum(ratio * adv, clipped * adv)
    size = np.maximum(abs(ratio * adv), abs(clipped * adv))
    return loss, np.where(ratio * adv <= clipped * adv, -ratio * adv, 0.0), size, margin


@pytest.mark.parametrize("loss_fn", list(LOSSES))
def test_each_formula_and_its_derivative_by_hand(loss_fn: str, measured: Any) -> None:
    """The pure functions on hypothesis' own numbers, against derivatives worked out on paper."""
    worst, tokens, examples = 0.0, 0, 0
    logprob = st.floats(-12, 0, width=32)
    number = st.one_of(st.just(0.0), st.floats(-8, 8, width=32, allow_subnormal=False))
    row = st.tuples(logprob, logprob, number, st.booleans())

    @settings(PROPERTY, max_examples=200)
    @given(st.lists(row, min_size=1, max_size=12), st.floats(0, 1), st.floats(1, 4), st.floats(0, 2))
    def check(rows: list[tuple[float, float, float, bool]], low: float, high: float, beta: float) -> None:
        nonlocal worst, tokens, examples
        lp, old, signed, flags = (np.array(column, dtype=np.float64) for column in zip(*rows, strict=True))
        flags[0] = 1.0
        x = {"weights": signed} if loss_fn == "cross_entropy" else {"logprobs": old, "advantages": signed}
        if loss_fn == "gspo":
            x["sequence_ratio_mask"] = flags
        defaults = LOSS_FN_CONFIGS[loss_fn]
        config = {k: {"clip_low_threshold": low, "clip_high_threshold": high, "beta": beta}[k] for k in defaults}
        loss, slope, size, margin = by_hand(loss_fn, lp, x, config)
        assume(margin > 1e-4)
        leaf = torch.tensor(lp, dtype=torch.float32, requires_grad=True)
        result = LOSSES[loss_fn].function(leaf, {k: torch.tensor(v, dtype=torch.float32) for k, v in x.items()}, config)
        result.loss.backward()
        assert leaf.grad is not None
        scale = np.maximum(size, 1e-30)
        assert float(result.loss.detach()) == pytest.approx(float(result.elementwise.detach().sum()), rel=1e-6)
        for found, expected in ((result.elementwise.detach(), loss), (leaf.grad, slope)):
            worst = max(worst, float((np.abs(found.double().numpy() - expected) / scale).max()))
        tokens, examples = tokens + len(lp), examples + 1

    check()
    assert examples >= 100
    measured(
        "1 losses", "formula and derivative by hand (relative, per token)", loss_fn,
        worst=worst, bound=TOLERANCE, batches=examples, tokens=tokens,
    )  # fmt: skip
