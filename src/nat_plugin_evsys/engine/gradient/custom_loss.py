"""The Datums of Tinker's two-pass scheme for custom losses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from tinker import types
from torch import Tensor

from nat_plugin_evsys.engine.gradient.datums import TEMPERATURE
from nat_plugin_evsys.errors import DataError

if TYPE_CHECKING:
    import tinker


def surrogate_datum(datum: tinker.Datum, index: int) -> tinker.Datum:
    """The Datum with nothing but its target_tokens: cross_entropy then gives the logprobs of all of them."""
    if "target_tokens" not in getattr(datum, "loss_fn_inputs", {}):
        raise DataError(f"data[{index}]: loss_fn_inputs lacks 'target_tokens'; a custom loss needs them")
    return bare_datum(datum)


def bare_datum(datum: tinker.Datum) -> tinker.Datum:
    """The Datum with its target_tokens, and its temperature if it has one, alone."""
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
