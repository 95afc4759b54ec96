"""Cuts a batch into micro-batches that fit in memory."""

from __future__ import annotations

from collections.abc import Sequence

from nat_plugin_evsys.engine.machine.memory import free_bytes
from nat_plugin_evsys.engine.model.loading import BaseModel

_CPU_ACTIVATION_BYTES = 2**30
_GPU_SHARE = 0.25
_MIN_TOKENS, _MAX_TOKENS = 256, 65536


def plan_micro_batches(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Indices grouped so that ``rows * longest`` of each group is at most ``token_budget``, sorted by length.

    A sequence that is longer than the budget gets a group of its own. Every index is in exactly one group.
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if groups and (len(groups[-1]) + 1) * lengths[index] <= token_budget:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def default_token_budget(base: BaseModel) -> int:
    """Padded tokens a micro-batch may have, from a rough figure of what autograd keeps for each token.

    Aims for 1 GiB on the CPU, where bigger batches gain nothing, and for a quarter of a GPU's free memory.
    """
    config = base.model.config.get_text_config()
    hidden, layers = config.hidden_size, config.num_hidden_layers
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    bytes_per_token = layers * (16 * hidden + 6 * inner) * base.dtype.itemsize
    target = float(_CPU_ACTIVATION_BYTES)
    if base.device.type == "cuda":
        target = _GPU_SHARE * free_bytes(base.device)
    return int(min(_MAX_TOKENS, max(_MIN_TOKENS, target // bytes_per_token)))
