"""A custom loss: what it must return, and the Datums of Tinker's two-pass scheme for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from tinker import types
from torch import Tensor

from nat_plugin_evsys.engine.gradient.datums import TEMPERATURE
from nat_plugin_evsys.errors import DataError

if TYPE_CHECKING:
    import tinker

CustomLoss = Callable[["list[tinker.Datum]", "list[Tensor]"], "tuple[Tensor, dict[str, float]]"]
"""``(data, logprobs) -> (loss, metrics)``; ``logprobs[i]`` has the shape of ``data[i]``'s target_tokens."""


def checked_loss(loss_fn: Any, *, bare: bool = False) -> CustomLoss:
    """``loss_fn`` that raises DataError when it returns anything but ``(loss, metrics)``.

    ``loss`` is a finite tensor that depends on the logprobs, ``metrics`` a dict of numbers. What ``loss_fn`` itself
    raises passes through.

    Args:
        bare: accept the loss alone, as in evsys.
    """
    if not callable(loss_fn):
        raise DataError(
            f"loss_fn is a {type(loss_fn).__name__}; forward_backward_custom takes a function "
            "(data, logprobs) -> (loss, metrics)"
        )

    def call(data: list[tinker.Datum], logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        returned = loss_fn(data, logprobs)
        if bare and isinstance(returned, Tensor):
            returned = returned, {}
        if not isinstance(returned, tuple) or len(returned) != 2:
            raise DataError(f"the custom loss returned a {type(returned).__name__}; return the tuple (loss, metrics)")
        loss, metrics = returned
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            raise DataError(
                "the custom loss must return a tensor computed from the logprobs with torch (not detached, no .item())"
            )
        if not bool(torch.isfinite(loss).all()):
            raise DataError("the custom loss is inf or NaN")
        return loss, _numbers(metrics)

    return call


def surrogate_datum(datum: tinker.Datum, index: int) -> tinker.Datum:
    """The Datum with only its target_tokens: cross_entropy then gives the logprobs of all of them."""
    if "target_tokens" not in getattr(datum, "loss_fn_inputs", {}):
        raise DataError(f"data[{index}]: loss_fn_inputs lacks 'target_tokens'; a custom loss needs them")
    return bare_datum(datum)


def bare_datum(datum: tinker.Datum) -> tinker.Datum:
    """The Datum with only its target_tokens and, if it has one, its temperature."""
    kept = {key: value for key, value in datum.loss_fn_inputs.items() if key in ("target_tokens", TEMPERATURE)}
    return types.Datum(datum.model_input, kept)


def leaf_gradient(leaf: Tensor, index: int) -> Tensor:
    """dC/dlogprobs of one Datum; DataError if there is none or it is not finite."""
    if leaf.grad is None:
        raise DataError(
            f"data[{index}]: the custom loss does not depend on its logprobs; it must use those of every Datum"
        )
    if not bool(torch.isfinite(leaf.grad).all()):
        raise DataError(f"data[{index}]: the custom loss has an inf or NaN gradient by its logprobs")
    return leaf.grad


def with_weights(datum: tinker.Datum, grad: Tensor) -> tinker.Datum:
    """The Datum whose cross_entropy has the gradient ``grad`` by the logprobs."""
    weights: Any = types.TensorData.from_torch(-grad)
    return types.Datum(datum.model_input, {**datum.loss_fn_inputs, "weights": weights})


def _numbers(metrics: Any) -> dict[str, float]:
    if not isinstance(metrics, Mapping):
        raise DataError(f"the custom loss returned metrics of type {type(metrics).__name__}; return a dict of numbers")
    numbers = {}
    for key, value in metrics.items():
        try:
            numbers[str(key)] = float(value)
        except (TypeError, ValueError) as exc:
            raise DataError(f"the custom loss's metric {key!r} is not a number: {value!r}") from exc
    return numbers
