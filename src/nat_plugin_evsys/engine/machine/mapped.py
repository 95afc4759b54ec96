"""Tensors with a memory mapping of their own, which the kernel takes back when they are freed.

The heap keeps what is freed (``allocator``), for buffers of equal size to use again. A buffer that grows from copy to
copy never fits into the gaps that it leaves behind.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

_SMALLEST = 2**20


def mapped_zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``torch.zeros``, on the CPU outside the heap if it takes a MiB or more.

    Raises:
        MemoryError: there is no room for it.
    """
    count = math.prod(shape)
    if device.type != "cpu" or count * dtype.itemsize < _SMALLEST:
        return torch.zeros(shape, dtype=dtype, device=device)
    try:
        # Private: a forked process gets a copy, and the kernel may use large pages.
        memory = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as exc:
        raise MemoryError(f"no memory for {count * dtype.itemsize >> 20} MiB: {exc}") from exc
    return torch.frombuffer(memory, dtype=dtype, count=count).view(*shape)
