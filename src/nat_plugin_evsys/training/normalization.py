"""The weight of a token in an optimizer step.

Tinker's losses are sums over tokens: ``L = sum_d sum_t l(d, t)``, with ``l`` linear in the advantage. Multiplying the
advantages of Datum d by ``s_d`` therefore gives exactly ``sum_d s_d sum_t l(d, t)``: each normalisation below is one of
Tinker's sums over scaled advantages, and needs nothing of the backend. (``dro`` also has a quadratic term; its ``beta``
is scaled along, which needs the same ``s`` for all Datums.) With T_d the sampled tokens of Datum d:

    full_step   s = 1 / (N * T)                 N groups of a full step, T mean sampled tokens of a group of the job
    tokens      s = 1 / sum_d T_d               mean over the tokens of the step, as DAPO (arXiv 2503.14476, eq. 8)
    sequences   s_d = 1 / (M * T_traj(d))       mean over the M trajectories of the step of the mean over their tokens,
                                                as GRPO (arXiv 2402.03300, eq. 3)
    sum         s = 1                           Tinker's own

``full_step`` is Dr. GRPO's fixed denominator (arXiv 2503.20783, section 3.2): it does not depend on what else is in the
step, so that a token of a long reply, or of the only group with a signal, weighs what every other token of the job
does. Its constant is the job's mean length where Dr. GRPO's is the longest possible reply: the same gradient up to a
constant, and one whose norm ``grad_clip_norm`` can be compared with. ``sequences`` has GRPO's length bias: tokens of a
long wrong reply are pushed down less than those of a short one.

What this changes under Adam: the update ``m / (sqrt(v) + eps)`` does not feel a constant factor. A factor that differs
between steps decides how much each step counts in m and v: with ``sum`` or ``full_step`` a step from one group of eight
counts an eighth (its square 1/64), with ``tokens`` as much as a full one. A constant factor matters in two places only:
the norm at which ``grad_clip_norm`` cuts, and entries of the gradient below eps. Both are why ``sum`` is not the
default.

The learning rate itself is not scaled by what is here; ``step_size.unsolved_factor`` does that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from tinker import Datum, TensorData

from nat_plugin_evsys.errors import ConfigError

Normalization = Literal["full_step", "tokens", "sequences", "sum"]


def datum_scales(
    lengths: Sequence[int], trajectories: Sequence[int], how: Normalization, *, full_step_tokens: float | None = None
) -> list[float]:
    """``s_d`` of each Datum of a step.

    Args:
        lengths: sampled tokens of each Datum, length D; at least one in all.
        trajectories: which trajectory each Datum is of, length D.
        how: see the module.
        full_step_tokens: ``N * T`` for ``full_step``; default is the step's own tokens, as if it were a full one.

    Raises:
        ConfigError: unknown normalisation.
    """
    tokens = sum(lengths)
    match how:
        case "sum":
            return [1.0] * len(lengths)
        case "tokens":
            return [1.0 / tokens] * len(lengths)
        case "full_step":
            return [1.0 / (full_step_tokens or tokens)] * len(lengths)
        case "sequences":
            of: dict[int, int] = {}
            for length, trajectory in zip(lengths, trajectories, strict=True):
                of[trajectory] = of.get(trajectory, 0) + length
            return [1.0 / (len(of) * of[trajectory]) for trajectory in trajectories]
        case _:
            raise ConfigError(f"unknown normalization `{how}`; it must be full_step, tokens, sequences or sum")


def scaled(datum: Datum, scale: float) -> Datum:
    """A copy whose advantages are multiplied by ``scale``."""
    if scale == 1.0:
        return datum
    advantages = datum.loss_fn_inputs["advantages"].to_numpy()
    return with_advantages(datum, advantages * np.float32(scale))


def with_advantages(datum: Datum, advantages: np.ndarray) -> Datum:
    """A copy with other advantages, shape (N,)."""
    values = TensorData(data=advantages.astype(np.float32), dtype="float32", shape=list(advantages.shape))
    return Datum(datum.model_input, {**datum.loss_fn_inputs, "advantages": values})
