"""How much memory a pack's forward pass keeps for the backward pass: measured, and predicted from two small probes."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nat_plugin_evsys.address_space import address_space_left
from nat_plugin_evsys.engine.machine.split_tensors import local

_COMFORTABLE_BYTES = 2**30  # beyond this a CPU gains nothing from a bigger pack but what the pack shares
_CPU_SHARE, _GPU_SHARE = 0.5, 0.7
_FEWEST_TOKENS = 256


class SavedBytes:
    """Counts the bytes of distinct storages that autograd keeps for the backward pass, without ``frozen`` tensors."""

    def __init__(self, frozen: Iterable[Tensor]) -> None:
        self.total = 0
        self._seen = {local(t).untyped_storage().data_ptr() for t in frozen}

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what the forward passes in the ``with`` block keep."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
            yield

    def _pack(self, tensor: Tensor) -> tuple[Tensor, int]:
        storage = local(tensor).untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.total += storage.nbytes()
        # The result of an operation holds the node that saves it here: without detach neither would ever be freed.
        return tensor.detach(), tensor._version


def _unpack(packed: tuple[Tensor, int]) -> Tensor:
    """The packed tensor. Autograd leaves it to its hooks to check that nobody wrote to it meanwhile."""
    tensor, version = packed
    if tensor._version != version:
        raise RuntimeError(
            f"a tensor of shape {list(tensor.shape)} that the backward pass needs was changed in place "
            f"(version {tensor._version}, saved at {version}); compute it out of place"
        )
    return tensor


@dataclass(frozen=True)
class TokenLimits:
    """Rows of a pack.

    Attributes:
        most: most rows of a pack, unless a single sequence has more.
        comfortable: packs stay below this if that repeats few tokens.
    """

    most: int
    comfortable: int

    def up_to(self, rows: int | None) -> TokenLimits:
        """These, and no more than ``rows``; None means any."""
        return self if rows is None else TokenLimits(min(self.most, rows), min(self.comfortable, rows))


@dataclass(frozen=True)
class MemoryModel:
    """``fixed + per_token * tokens`` bytes are kept for the backward pass of a pack."""

    fixed: float
    per_token: float

    @classmethod
    def fit(cls, small: tuple[int, float], large: tuple[int, float]) -> MemoryModel:
        """From two measurements, ``(tokens, bytes)`` each."""
        slope = (large[1] - small[1]) / (large[0] - small[0])
        return cls(max(0.0, small[1] - slope * small[0]), slope)

    def predict(self, tokens: int) -> float:
        """Bytes for a pack of this many rows."""
        return self.fixed + self.per_token * tokens

    def limits(self, device: torch.device) -> TokenLimits:
        """Rows of a pack that fit in the free memory of ``device``."""
        free = free_bytes(device)
        per_token = max(1.0, self.per_token)  # an adapter on the head alone keeps nothing for a token
        share = _CPU_SHARE if device.type == "cpu" else _GPU_SHARE
        most = max(_FEWEST_TOKENS, int((share * free - self.fixed) / per_token))
        comfortable = max(_FEWEST_TOKENS, int(_COMFORTABLE_BYTES / per_token)) if device.type == "cpu" else most
        return TokenLimits(most, min(most, comfortable))


def peak_bytes(device: torch.device) -> int:
    """The peak memory of this process so far: resident on the CPU, allocated on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # ru_maxrss is in KiB, on macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def free_bytes(device: torch.device) -> int:
    """Memory that this process may still use on ``device``: on the CPU, of the machine, its control group
    and ``ulimit -v``.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    candidates = [free for free in (_machine_free(), _group_free(), address_space_left()) if free is not None]
    return min(candidates, default=4 * 2**30)


def _machine_free() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _group_free() -> int | None:
    """The limit of control group v2, as a container sees it; None without a limit."""
    root = Path("/sys/fs/cgroup")
    try:
        limit = (root / "memory.max").read_text().strip()
        used = int((root / "memory.current").read_text())
        statistics = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    # Pages of files that are not in use go when memory is asked for.
    return None if limit == "max" else max(0, int(limit) - used + int(statistics.get("inactive_file", 0)))
