"""How much memory sampling takes where nobody says."""

from __future__ import annotations

import torch

from nat_plugin_evsys.engine.machine.memory import free_bytes

_CPU_KV_BYTES = 4 * 2**30
_PREFIX_BYTES = 2 * 2**30


def kv_budget(device: torch.device) -> int:
    """Bytes for the sequences of one policy that are being decoded."""
    return torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else _CPU_KV_BYTES


def prefix_budget(device: torch.device) -> int:
    """Bytes for prefixes that are kept between requests."""
    return min(_PREFIX_BYTES, free_bytes(device) // 4)
