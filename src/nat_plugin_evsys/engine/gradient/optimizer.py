"""AdamW over the LoRA matrices, as Tinker documents it: identical to ``torch.optim.AdamW``, values per step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nat_plugin_evsys.errors import ConfigError, NonFiniteGradientError

if TYPE_CHECKING:
    from tinker import types


_LARGEST = 1e18
"""Beyond this, squares and products of two values leave float32's range."""

_LEAST_EPS = 1e-37
"""Below this, float32 rounds eps to zero, and a parameter that has no gradient yet (0 / 0) would become NaN."""


class AdamW:
    """Decoupled weight decay (arXiv 1711.05101), bias-corrected moments in fp32, global-norm clipping before the step.

    Args:
        parameters: name -> fp32 leaf tensor; updated in place.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._parameters = dict(parameters)
        self._optimizer = torch.optim.AdamW(self._parameters.values())

    def step(self, gradient: Mapping[str, Tensor], adam: types.AdamParams) -> dict[str, float]:
        """One step; returns ``grad_norm`` (before clipping), ``clip_coefficient`` and ``learning_rate``.

        Raises:
            ConfigError: a value of ``adam`` is out of range.
            NonFiniteGradientError: the gradient has an inf or NaN, or an entry whose square is beyond float32 and would
                leave an inf in the second moment forever; weights and moments are unchanged.
        """
        check_adam(adam)
        grad_norm = global_norm(gradient)
        if not math.isfinite(grad_norm):
            bad = [name for name, g in gradient.items() if not bool(torch.isfinite(g).all())]
            raise NonFiniteGradientError(
                f"optim_step refused: the gradient is not finite in {len(bad)} of {len(gradient)} matrices "
                f"(first: {bad[0] if bad else 'the norm itself'}); weights and moments are unchanged and the "
                "gradient is cleared. Look for extreme logprobs or advantages in the last batch"
            )
        # torch.nn.utils.clip_grad_norm_ has the same 1e-6.
        clip = min(1.0, adam.grad_clip_norm / (grad_norm + 1e-6)) if adam.grad_clip_norm > 0 else 1.0
        if grad_norm * clip > _LARGEST:
            largest, name = max((float(g.abs().max()), name) for name, g in gradient.items())
            if largest * clip > _LARGEST:
                raise NonFiniteGradientError(
                    f"optim_step refused: the gradient has an entry of {largest:.3g} in {name}, whose square is not "
                    "finite in float32; weights and moments are unchanged and the gradient is cleared. Set "
                    "grad_clip_norm, or look for extreme logprobs or advantages in the last batch"
                )
        group = self._optimizer.param_groups[0]
        group.update(
            lr=adam.learning_rate, betas=(adam.beta1, adam.beta2), eps=adam.eps, weight_decay=adam.weight_decay
        )
        for name, parameter in self._parameters.items():
            parameter.grad = gradient[name] * clip if clip < 1.0 else gradient[name]
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return {"grad_norm": grad_norm, "clip_coefficient": clip, "learning_rate": adam.learning_rate}

    def state_tensors(self) -> dict[str, Tensor]:
        """``<parameter>.exp_avg``, ``.exp_avg_sq`` and ``.step``; empty before the first step."""
        state = self._optimizer.state
        return {
            f"{name}.{key}": value.detach()
            for name, parameter in self._parameters.items()
            for key, value in state.get(parameter, {}).items()
        }

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Load what ``state_tensors`` returned; an empty mapping resets to a fresh optimizer."""
        self._optimizer.state.clear()
        for name, parameter in self._parameters.items():
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{name}.{key}" in tensors]
            for key in keys:
                value = tensors[f"{name}.{key}"].detach().clone()
                # torch keeps the step count on the CPU.
                self._optimizer.state[parameter][key] = value if key == "step" else value.to(parameter.device)

    def reset(self) -> None:
        """Clear the moments."""
        self.load_state_tensors({})


def global_norm(gradient: Mapping[str, Tensor]) -> float:
    """L2 norm over all matrices together, in float64 so that finite values cannot overflow."""
    norms = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in gradient.values()]
    return float(torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms])))


def check_adam(adam: types.AdamParams) -> None:
    """Raises ConfigError unless every value is finite and in AdamW's range."""
    if not hasattr(adam, "beta2"):
        raise ConfigError(f"optim_step takes tinker.AdamParams, got {type(adam).__name__}; AdamW is the only optimizer")
    for name in ("learning_rate", "beta1", "beta2", "eps", "weight_decay", "grad_clip_norm"):
        value = getattr(adam, name)
        below_one = not name.startswith("beta") or value < 1
        if not math.isfinite(value) or value < 0 or not below_one:
            limit = "0 <= value < 1" if name.startswith("beta") else "a finite value >= 0"
            raise ConfigError(f"AdamParams.{name} is {value}; expected {limit}")
    if adam.eps < _LEAST_EPS:
        raise ConfigError(f"AdamParams.eps is {adam.eps}; expected at least {_LEAST_EPS:g}: it keeps 0 / 0 from NaN")
    for name in ("learning_rate", "weight_decay", "eps"):
        if getattr(adam, name) > _LARGEST:
            raise ConfigError(f"AdamParams.{name} is {getattr(adam, name)}; expected at most {_LARGEST:g}")
