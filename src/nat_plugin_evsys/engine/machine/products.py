"""Matrix products with frozen fp32 weights on the CPU, by whichever library is faster.

MKL, which ``torch.mm`` calls, keeps its best kernels for Intel's processors. On AMD's, oneDNN is a tenth quicker, more
with the weight reordered in advance. The choice depends on the processor alone, so a step is the same in every run.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_ROWS = 32  # any hint above 4 gives the same order


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
    if not prefers_onednn():
        return weight
    out: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
    return out


def product(x: Tensor, weight: Tensor) -> Tensor:
    """``x [T, in] -> x W^T [T, out]``; the weight as it is, or ``reordered``."""
    if not prefers_onednn():
        return x @ weight.T
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
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
