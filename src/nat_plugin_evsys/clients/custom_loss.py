"""A user's Python loss, with its return value checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nat_plugin_evsys.errors import DataError

if TYPE_CHECKING:
    import tinker

CustomLoss = Callable[["list[tinker.Datum]", "list[Tensor]"], "tuple[Tensor, dict[str, float]]"]


def checked_loss(loss_fn: Any) -> CustomLoss:
    """``loss_fn`` that raises DataError when it returns anything but ``(loss, metrics)``.

    ``loss`` is a finite tensor that depends on the logprobs, ``metrics`` a dict of numbers. What ``loss_fn`` itself
    raises passes through.
    """
    if not callable(loss_fn):
        raise DataError(
            f"loss_fn is a {type(loss_fn).__name__}; forward_backward_custom takes a function "
            "(data, logprobs) -> (loss, metrics)"
        )

    def call(data: list[tinker.Datum], logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        returned = loss_fn(data, logprobs)
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


def _numbers(metrics: Any) -> dict[str, float]:
    if not isinstance(metrics, Mapping):
        raise DataError(f"the custom loss returned metrics of type {type(metrics).__name__}; return a dict of numbers")
    numbers = {}
    for key, value in metrics.items():
        try:
            numbers[str(key)] = float(value)
        except (TypeError, ValueError) as exc:
            raise DataError(f"the custom loss's metric {key!r} is no number: {value!r}") from exc
    return numbers
