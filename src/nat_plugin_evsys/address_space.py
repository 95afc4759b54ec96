"""Address space under ``ulimit -v``: what is left of it, and whether PyTorch fits into it at all."""

from __future__ import annotations

import resource
from pathlib import Path

from nat_plugin_evsys.errors import OutOfMemoryError

LEAST_BYTES = 2 * 2**30
"""Below this nothing can be trained: PyTorch, transformers and NAT take 1.2 GB, and the tiny run 1.7 GB on one thread.
What fails then, fails anywhere: in an import, in a library that loops, in an error without a text."""


def address_space_left() -> int | None:
    """Bytes that the process may still map; None without a limit."""
    limit = _limit()
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        return None
    return None if limit is None else max(0, limit - pages * resource.getpagesize())


def require_address_space() -> None:
    """Refuse a limit that PyTorch alone exceeds. Call it before PyTorch is imported.

    Raises:
        OutOfMemoryError: the limit is below ``LEAST_BYTES``.
    """
    limit = _limit()
    if limit is not None and limit < LEAST_BYTES:
        raise OutOfMemoryError(
            f"this process may have {limit / 1e9:.2f} GB of memory (ulimit -v {limit // 1024}), and with PyTorch and "
            f"transformers even the smallest model needs {LEAST_BYTES / 1e9:.2f} GB; raise the limit to that and four "
            "times the model's weights, or remove it (ulimit -v unlimited)"
        )


def _limit() -> int | None:
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit == resource.RLIM_INFINITY else limit
