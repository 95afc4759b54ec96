"""The loss functions: pure, one Datum at a time, always sums over tokens.

Notation: ``lp`` = learner's log p(target), ``q`` = the sampler's logprobs, ``A`` = advantages, ``r = exp(lp - q)``,
``sg`` = stop gradient; all of shape (N,), position i predicts target i. The loss of a batch is the sum over its Datums,
never a mean (Tinker: "for all objectives we sum the token-level losses"). ``ppo``, ``cispo`` and ``gspo`` take absolute
ratio bounds ``clip_low_threshold`` and ``clip_high_threshold``, from the config or, per token, from the Datum's inputs
of those names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

Inputs = Mapping[str, Tensor]
Config = Mapping[str, float]


class LossResult(NamedTuple):
    """What a loss function returns for one Datum.

    Attributes:
        loss: scalar, the sum of ``elementwise``; carries the gradient.
        elementwise: loss of each target, shape of the targets, (N,) or (N, K).
        stats: figures of each *trained* token, (n,) detached, for ``summarise``. A token is trained on when its
            advantage (cross_entropy: one of its weights) is not zero.
    """

    loss: Tensor
    elementwise: Tensor
    stats: dict[str, Tensor]


LossFn = Callable[[Tensor, Inputs, Config], LossResult]


def cross_entropy(logprobs: Tensor, inputs: Inputs, config: Config) -> LossResult:
    """``-sum(lp * weights)``; targets, weights and logprobs are (N,), or (N, K) for soft targets.

    Weights may have any sign. Source: Tinker docs, losses (cross_entropy).
    """
    weights = inputs["weights"]
    elementwise = -logprobs * weights
    trained = trained_rows(inputs)
    return LossResult(elementwise.sum(), elementwise, {"weights": weights[trained].reshape(-1).detach()})


def importance_sampling(logprobs: Tensor, inputs: Inputs, config: Config) -> LossResult:
    """``-sum(r * A)``. Source: Tinker docs, losses (importance_sampling)."""
    ratio = _ratio(logprobs, inputs)
    return _result(-ratio * inputs["advantages"], logprobs, inputs, ratio)


def ppo(logprobs: Tensor, inputs: Inputs, config: Config) -> LossResult:
    """``-sum(min(r * A, clamp(r, low, high) * A))``.

    Source: arXiv 1707.06347 eq. 7; Tinker docs, losses (ppo), whose fixed epsilon 0.2 gives the defaults 0.8 and 1.2.
    """
    ratio = _ratio(logprobs, inputs)
    return _clipped_surrogate(ratio, ratio, logprobs, inputs, config)


def cispo(logprobs: Tensor, inputs: Inputs, config: Config) -> LossResult:
    """``-sum(sg(clamp(r, low, high)) * lp * A)``: the ratio is clipped, but no token loses its gradient.

    Source: arXiv 2506.13585; Tinker docs, losses (cispo), defaults 0 and 4.
    """
    advantages = inputs["advantages"]
    ratio = _ratio(logprobs, inputs).detach()
    low, high = _thresholds(inputs, config)
    outside = (ratio < low) | (ratio > high)
    elementwise = -torch.clamp(ratio, low, high) * logprobs * advantages
    return _result(elementwise, logprobs, inputs, ratio, outside)


def dro(logprobs: Tensor, inputs: Inputs, config: Config) -> LossResult:
    """``-sum(lp * A - beta / 2 * (lp - q)^2)``.

    There is no mask: a prompt row is penalised too unless its ``q`` equals the learner's logprob. Source: arXiv
    2405.19107; Tinker docs, losses (dro), whose example has beta 0.05.
    """
    gap = logprobs - inputs["logprobs"]
    elementwise = -(logprobs * inputs["advantages"] - 0.5 * config["beta"] * gap.square())
    return _result(elementwise, logprobs, inputs, torch.exp(gap))


def gspo(logprobs: Tensor, inputs: Inputs, config: Config) -> LossResult:
    """``-sum(min(s_t * A, clamp(s_t, low, high) * A))`` with one ratio for the whole Datum.

    ``s = exp(mean over mask != 0 of (lp - q))`` and ``s_t = sg(s) * exp(lp - sg(lp))``; the mask is
    ``inputs["sequence_ratio_mask"]`` (N,). Source: arXiv 2507.18071 (GSPO-token; its clip range 3e-4 below and 4e-4
    above 1 gives the defaults); Tinker docs, losses (gspo).
    """
    mask = inputs["sequence_ratio_mask"] != 0
    gap = (logprobs - inputs["logprobs"]).detach()
    sequence_ratio = torch.exp(gap[mask].mean()) if bool(mask.any()) else torch.ones_like(gap[:1]).squeeze()
    ratio = sequence_ratio * torch.exp(logprobs - logprobs.detach())
    return _clipped_surrogate(ratio, torch.exp(gap), logprobs, inputs, config)


def _ratio(logprobs: Tensor, inputs: Inputs) -> Tensor:
    """``r``, and 1 in masked rows (``A == 0``), where a placeholder such as -99999 as ``q`` would make 0 * inf."""
    return torch.exp((logprobs - inputs["logprobs"]).masked_fill(inputs["advantages"] == 0, 0.0))


def _clipped_surrogate(
    ratio: Tensor, token_ratio: Tensor, logprobs: Tensor, inputs: Inputs, config: Config
) -> LossResult:
    advantages = inputs["advantages"]
    low, high = _thresholds(inputs, config)
    plain, clipped = ratio * advantages, torch.clamp(ratio, low, high) * advantages
    return _result(-torch.minimum(plain, clipped), logprobs, inputs, token_ratio, clipped < plain)


def _thresholds(inputs: Inputs, config: Config) -> tuple[Tensor, Tensor]:
    """``(low, high)``, each (N,): per token if the Datum carries them, else the config's."""
    like = inputs["advantages"]
    low = inputs.get("clip_low_threshold")
    high = inputs.get("clip_high_threshold")
    return (
        torch.full_like(like, config["clip_low_threshold"]) if low is None else low,
        torch.full_like(like, config["clip_high_threshold"]) if high is None else high,
    )


def _result(
    elementwise: Tensor, logprobs: Tensor, inputs: Inputs, ratio: Tensor, clipped: Tensor | None = None
) -> LossResult:
    trained = trained_rows(inputs)
    stats = {
        "ratio": ratio.detach()[trained],
        "log_ratio": (logprobs.detach() - inputs["logprobs"])[trained],
    }
    if clipped is not None:
        stats["clipped"] = clipped[trained].to(torch.float32)
    return LossResult(elementwise.sum(), elementwise, stats)


def trained_rows(inputs: Inputs) -> Tensor:
    """(N,) bool: rows whose advantage, or one of whose weights, is not zero."""
    if "advantages" in inputs:
        return inputs["advantages"] != 0
    weights = inputs["weights"]
    return weights != 0 if weights.dim() == 1 else (weights != 0).any(dim=-1)


def gradient_rows(loss_fn: str, inputs: Inputs, config: Config) -> Tensor:
    """(N,) bool: rows whose logprob gets a gradient from the loss; the others need no backward pass."""
    rows = trained_rows(inputs)
    return torch.ones_like(rows) if loss_fn == "dro" and config["beta"] != 0 else rows


def read_rows(loss_fn: str, inputs: Inputs, config: Config) -> Tensor:
    """(N,) bool: rows whose logprob changes the loss or its metrics: ``gradient_rows`` and gspo's mask."""
    rows = gradient_rows(loss_fn, inputs, config)
    return rows | (inputs["sequence_ratio_mask"] != 0) if "sequence_ratio_mask" in inputs else rows


@dataclass(frozen=True)
class LossSpec:
    """A loss function with the inputs that it takes (``target_tokens`` is always required)."""

    function: LossFn
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


_RL = ("logprobs", "advantages")
_MASK = ("mask",)
"""(N,): the loss of each token is multiplied by it. *Extension*; evsys's Datums carry it. The caller folds it into the
advantages, in which these losses are linear; dro is not."""
_CLIP = ("clip_low_threshold", "clip_high_threshold")

LOSSES: dict[str, LossSpec] = {
    "cross_entropy": LossSpec(cross_entropy, optional=("weights",)),
    "importance_sampling": LossSpec(importance_sampling, _RL, _MASK),
    "ppo": LossSpec(ppo, _RL, (*_CLIP, *_MASK)),
    "cispo": LossSpec(cispo, _RL, (*_CLIP, *_MASK)),
    "dro": LossSpec(dro, _RL),
    "gspo": LossSpec(gspo, (*_RL, "sequence_ratio_mask"), _CLIP),
}


def summarise(results: Sequence[LossResult]) -> dict[str, float]:
    """Metrics of a whole call, named ``name:reduction`` as the Tinker protocol demands.

    Always ``loss:sum`` and ``tokens:sum`` (trained tokens); for cross_entropy ``weights:sum``. For the others, over the
    trained tokens where there are any: ``ratio:mean``, ``ratio:max``, ``clip_fraction:mean`` and two estimates of
    KL(sampler || learner) from the sampled tokens, ``kl_v1:mean`` = mean(q - lp) and ``kl_v2:mean`` =
    mean((q - lp)^2) / 2.
    """
    stats = {key: torch.cat([r.stats[key] for r in results]).double() for key in results[0].stats}
    metrics = {"loss:sum": float(torch.stack([r.loss.detach().double() for r in results]).sum())}
    metrics["tokens:sum"] = float(sum(int(trained_count(r)) for r in results))
    if "weights" in stats:
        metrics["weights:sum"] = float(stats["weights"].sum())
    if metrics["tokens:sum"] == 0 or "ratio" not in stats:
        return metrics
    metrics["ratio:mean"] = float(stats["ratio"].mean())
    metrics["ratio:max"] = float(stats["ratio"].max())
    metrics["kl_v1:mean"] = float(-stats["log_ratio"].mean())
    metrics["kl_v2:mean"] = float(stats["log_ratio"].square().mean() / 2)
    if "clipped" in stats:
        metrics["clip_fraction:mean"] = float(stats["clipped"].mean())
    return metrics


def trained_count(result: LossResult) -> int:
    """Trained tokens of one Datum."""
    if "ratio" in result.stats:
        return result.stats["ratio"].numel()
    width = result.elementwise.shape[1] if result.elementwise.dim() == 2 else 1
    return result.stats["weights"].numel() // width
