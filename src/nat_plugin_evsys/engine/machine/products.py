"""Matrix products with frozen fp32 weights on the CPU, by whichever library is faster.

MKL, which ``torch.mm`` calls, keeps its best kernels for Intel's processors. On AMD's, oneDNN is a tenth quicker, more
with the weight reordered in advance. The choice depends on the processor and the weight's shape alone, so a step is the
same in every run.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_ROWS = 32  # any hint above 4 gives the same order, which is equally fast for any number of rows


@cache
def prefers_onednn() -> bool:
    """Whether oneDNN is available and faster here."""
    try:
        amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return amd and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def reordered(weight: Tensor) -> Tensor:
    """``weight [out, in]``, of any strides, in the form that ``product`` reads fastest; a copy, or itself."""
    return in_onednn_order(weight) if prefers_onednn() else weight


def product(x: Tensor, weight: Tensor) -> Tensor:
    """``x [T, in] -> x W^T [T, out]``; the weight as it is, or ``reordered``."""
    return onednn_product(x, weight, None) if prefers_onednn() else x @ weight.T


def for_few_rows(weight: Tensor) -> Tensor:
    """A copy of ``weight [out, in]`` in the form that ``few_rows_product`` reads fastest; it needs oneDNN.

    On Intel's processors MKL is faster with a transposed weight that is no higher than wide: for 24 to 64 rows of
    SmolLM2-135M by 1.2 to 1.6 times. For others, and for the output head, oneDNN is.
    """
    rows, columns = weight.shape
    if torch.backends.mkl.is_available() and not prefers_onednn() and rows <= columns:
        return weight.T.contiguous()
    return in_onednn_order(weight)


def few_rows_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x [..., in] -> x W^T + bias [..., out]``, of a weight ``for_few_rows``."""
    if weight.is_mkldnn:
        return onednn_product(x, weight, bias)
    return x @ weight if bias is None else x @ weight + bias


def in_onednn_order(weight: Tensor) -> Tensor:
    """A copy of ``weight [out, in]`` for ``onednn_product``."""
    out: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
    return out


def onednn_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x [..., in] -> x W^T + bias [..., out]``, of a weight ``in_onednn_order``."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


_TRANSPOSED = WeakTensorKeyDictionary()


def transposed(weight: Tensor) -> Tensor:
    """``weight [out, in]``, frozen, such that ``product(x [T, out], transposed(weight))`` is ``x W [T, in]``.

    A copy, where there is one, is made once and lives as long as the weight: making it costs what hundreds of rows do.
    """
    if not prefers_onednn():
        return weight.T
    made: tuple[int, Tensor] | None = _TRANSPOSED.get(weight)
    if made is not None and made[0] == weight._version:
        return made[1]
    copy = reordered(weight.detach().T)
    _TRANSPOSED[weight] = (weight._version, copy)
    return copy
