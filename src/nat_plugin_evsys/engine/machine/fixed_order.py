"""Sums in one order, so that the same inputs give the same bits in every process."""

from __future__ import annotations

import os

import torch


def compute_in_fixed_order() -> None:
    """From now on this process computes on one CPU thread, with PyTorch's deterministic kernels.

    A sum that several threads share is cut where their number says. An operation without a deterministic kernel fails
    instead of giving other bits each time. Call it before the first use of a GPU.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
