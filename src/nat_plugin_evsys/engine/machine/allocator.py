"""The one place that changes the process's memory allocator.

glibc gives big buffers back to the kernel as soon as they are freed, and the kernel clears each page that is asked
for again. An engine that makes and frees the same big tensors at every step spends up to half its time on that. So
the C library is told, for the whole process and for good, to keep freed memory: resident memory then stays near its
highest level. ``EVSYS_KEEP_MEMORY=0`` in the environment leaves the allocator as it is.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import threading
from functools import cache

logger = logging.getLogger(__name__)

# malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8
_KEEP_BYTES = 2**31 - 1
_GROW_BYTES = 64 * 2**20

_stepped = threading.Event()


def share_heap() -> None:
    """Let threads that are started later share one heap, once per process and for good.

    glibc would give most threads a heap of their own, each of which keeps what its largest request once took; and what
    one thread frees, another cannot use.
    """
    if _is_glibc():
        _mallopt(_M_ARENA_MAX, 1)


@cache
def keep_memory() -> bool:
    """Tell glibc to keep freed memory, once per process; returns whether it does.

    No buffer gets a mapping of its own (``M_MMAP_MAX=0``: the threshold itself cannot be raised above 32 MiB), the heap
    is never trimmed, and threads started later share the main heap, because the other heaps are trimmed regardless.
    """
    if os.environ.get("EVSYS_KEEP_MEMORY", "1") == "0" or not _is_glibc():
        return False
    options = {
        _M_MMAP_MAX: 0,
        _M_TRIM_THRESHOLD: _KEEP_BYTES,
        _M_TOP_PAD: _GROW_BYTES,
        _M_ARENA_MAX: 1,
    }
    done = all([_mallopt(option, value) for option, value in options.items()])
    if not done:
        logger.warning("glibc does not let this process keep freed memory; training steps will be slower")
    return done


def note_step() -> None:
    """Say that a training step has run: what it worked with is free, and ``give_back`` has something to give."""
    _stepped.set()


def give_back() -> None:
    """Give the pages that training steps have freed back to the kernel: once, if one ran since the last time.

    For a moment when much else than before is about to be asked for: what fits into no gap grows the heap, and the gaps
    stay resident beside it.
    """
    if _stepped.is_set() and _is_glibc():
        _stepped.clear()
        ctypes.CDLL(None).malloc_trim(0)


@cache
def _is_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"


def _mallopt(option: int, value: int) -> bool:
    return int(ctypes.CDLL(None).mallopt(option, value)) == 1
