"""The one place that configures Python's garbage collector."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def gc_frozen() -> Iterator[None]:
    """Within it, the garbage collector ignores the objects that exist now.

    NAT, LangChain, torch and transformers are over half a million objects that live as long as the process. A full
    collection visits all of them, which stops every thread for nearly half a second, and rollouts make enough objects
    for one every few seconds.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
