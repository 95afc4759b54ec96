"""Tensors that are split over the processes of a group (torch's DTensor), and those that are not."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def is_dtensor(tensor: Tensor) -> bool:
    """Without importing DTensor, which takes a while."""
    return hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that may be split."""
    split: Any = tensor
    part: Tensor = split.to_local() if is_dtensor(tensor) else tensor
    return part


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be split; every process of the group must ask for it."""
    split: Any = tensor
    full: Tensor = split.full_tensor() if is_dtensor(tensor) else tensor
    return full
