"""How much memory sampling takes where nobody says."""

from __future__ import annotations

import torch

from nat_plugin_evsys.engine.machine.memory import free_bytes
from nat_plugin_evsys.engine.sampling.row_decoder import RowDecoder

_CPU_KV_BYTES = 4 * 2**30
_PREFIX_BYTES = 2 * 2**30


class KVBudget:
    """Memory for the sequences that a sampler decodes, of all its policies together.

    Attributes:
        max_bytes: of all; a policy decodes one sequence at least, also where that is more.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._decoders: list[RowDecoder] = []

    def join(self, decoder: RowDecoder) -> None:
        """Count what a decoder holds, until it leaves."""
        self._decoders.append(decoder)

    def leave(self, decoder: RowDecoder) -> None:
        """It holds nothing from now on."""
        self._decoders.remove(decoder)

    def takes(self, needed: int, of: RowDecoder | None = None) -> bool:
        """Whether there is room for ``needed`` bytes beside what all decoders hold but ``of``, which needs them."""
        return needed + sum(each.kv_bytes for each in self._decoders if each is not of) <= self.max_bytes


def kv_bytes(device: torch.device) -> int:
    """Bytes for all sequences that are being decoded."""
    return free_bytes(device) // 2 if device.type == "cuda" else _CPU_KV_BYTES


def prefix_budget(device: torch.device) -> int:
    """Bytes for prefixes that are kept between requests."""
    return min(_PREFIX_BYTES, free_bytes(device) // 4)
