"""The KL penalty that pulls the policy to the base model, as a change of the advantages: ``beta`` times the KL.

With ``lp`` the learner's, ``q`` the sampler's and ``ref`` the base model's log-probability of a sampled token, and
``r = exp(lp - q)``, the estimators of the KL and their coefficient c, the derivative by lp (k1: the penalty itself):

    k1   log-ratio        q - ref                             c = q - ref
    k2   half its square  (lp - ref)^2 / 2                    c = lp - ref
    k3   never negative   exp(ref - lp) - (ref - lp) - 1      c = 1 - exp(ref - lp)

(Schulman, "Approximating KL divergence", 2020.) The advantage of the token becomes ``A - beta c``, so that
``importance_sampling`` is ``-sum(r (A - beta c))``: one of Tinker's sums still. With ``k1`` the KL is a part of the
reward, taken at the weights that sampled, as in InstructGPT (arXiv 2203.02155). With ``k2`` and ``k3`` its gradient is
``r c grad(lp)``: for k2 that of the exact KL, with importance weights (arXiv 2512.21852); k3 is GRPO's (arXiv
2402.03300, eq. 4), bounded where the learner likes a token better than the base does, and biased.

Cost: one forward pass without the adapter over the Datums, and for k2 and k3 another one with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tinker import Datum, TensorData

from nat_plugin_evsys.errors import ConfigError
from nat_plugin_evsys.rollouts.datums import Provenance
from nat_plugin_evsys.training.normalization import with_advantages

KlEstimator = Literal["k1", "k2", "k3"]

Floats = NDArray[np.floating[Any]]


def kl_coefficient(sampler: Floats, learner: Floats | None, base: Floats, estimator: KlEstimator) -> Floats:
    """c of each token, by the table of the module; all shapes (n,).

    Args:
        learner: may be None for k1, which does not read it.

    Raises:
        ConfigError: unknown estimator, or k2 or k3 without the learner's logprobs.
    """
    if estimator == "k1":
        return sampler - base
    if estimator not in ("k2", "k3"):
        raise ConfigError(f"unknown KL estimator `{estimator}`; it must be k1, k2 or k3")
    if learner is None:
        raise ConfigError(f"KL estimator {estimator} needs the learner's logprobs of the tokens")
    return learner - base if estimator == "k2" else 1 - np.exp(base - learner)


def kl_penalised(
    datum: Datum,
    origin: Provenance,
    base: TensorData,
    beta: float,
    *,
    estimator: KlEstimator = "k1",
    learner: TensorData | None = None,
) -> Datum:
    """A copy of a Datum whose advantages are ``A - beta c`` at its sampled tokens.

    Args:
        origin: says which rows were sampled.
        base: the base model's logprobs of target_tokens, (N,).
        learner: the learner's, (N,); see ``kl_coefficient``.
    """
    rows = origin.rows
    advantages = np.array(datum.loss_fn_inputs["advantages"].to_numpy(), dtype=np.float64)
    of_learner = None if learner is None else _rows(learner, rows)
    sampler = _rows(datum.loss_fn_inputs["logprobs"], rows)
    advantages[rows] -= beta * kl_coefficient(sampler, of_learner, _rows(base, rows), estimator)
    return with_advantages(datum, advantages)


def mean_kl(sampler: Sequence[TensorData], other: Sequence[TensorData], origins: Sequence[Provenance]) -> float:
    """Mean over sampled tokens of the k3 estimate of KL(sampler || other), in nats: never negative."""
    gap = _gaps(sampler, other, origins)
    return float(np.mean(np.exp(gap) - gap - 1))


def mean_square_gap(sampler: Sequence[TensorData], other: Sequence[TensorData], origins: Sequence[Provenance]) -> float:
    """Mean over sampled tokens of the square of the log-ratio."""
    return float(np.square(_gaps(sampler, other, origins)).mean())


def kl_v2(
    before: Sequence[TensorData], data: Sequence[Datum], outputs: Sequence[Mapping[str, TensorData]]
) -> float | None:
    """``mean((lp - q)^2) / 2`` over the tokens whose advantage is not 0, as the engine's ``kl_v2:mean``.

    Args:
        before: q of each Datum's target_tokens, (N,).
        data: what a forward_backward was given.
        outputs: what it returned for each Datum; ``logprobs`` (N,) are the learner's.

    Returns:
        nats a token; None where a Datum has no ``logprobs``, or none has such a token.
    """
    if len(outputs) != len(data) or not all("logprobs" in output for output in outputs):
        return None
    gaps = []
    for of_before, datum, output in zip(before, data, outputs, strict=True):
        rows = np.flatnonzero(datum.loss_fn_inputs["advantages"].to_numpy())
        gaps.append(_rows(output["logprobs"], rows) - _rows(of_before, rows))
    together = np.concatenate(gaps)
    return float(np.square(together).mean() / 2) if together.size else None


def _gaps(sampler: Sequence[TensorData], other: Sequence[TensorData], origins: Sequence[Provenance]) -> Floats:
    """``other - sampler`` at every sampled token."""
    gaps = []
    for one, two, origin in zip(sampler, other, origins, strict=True):
        rows = origin.rows
        gaps.append(_rows(two, rows) - _rows(one, rows))
    return np.concatenate(gaps)


def _rows(values: TensorData, rows: NDArray[np.int64]) -> Floats:
    return np.asarray(values.to_numpy(), dtype=np.float64)[rows]
