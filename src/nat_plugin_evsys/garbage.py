"""Python's garbage collector: what it does not look at, and what is not left for it."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from nat_plugin_evsys.errors import causes


@contextmanager
def gc_frozen() -> Iterator[None]:
    """Within it, the garbage collector ignores the objects that exist now.

    NAT, LangChain, torch and transformers are over half a million objects that live as long as the process. A full
    collection visits all of them, which stops every thread for nearly half a second, and requests and rollouts make
    enough objects for one every few seconds.
    """
    freeze()
    gc.collect()  # there is nothing to collect; it learns how few objects are left, and waits for a quarter of that
    try:
        yield
    finally:
        gc.unfreeze()


def freeze() -> None:
    """From now on, the garbage collector ignores the objects that exist now: see ``gc_frozen``."""
    gc.collect()  # what is garbage now would be ignored as well
    gc.freeze()


def let_go(error: BaseException) -> None:
    """Drop the frames of an error that has been dealt with, and of its causes.

    An error that came through an asyncio future refers to frames that refer to the future, which refers to the error.
    With such a ring, all that its frames have as local variables waits for the garbage collector: a body of 100 MiB.
    """
    for each in causes(error, implicit=True):
        each.__traceback__ = None


def empty_frames(error: BaseException) -> None:
    """Drop the local variables of an error that is kept, and of its causes; its traceback stays, for the log.

    Whoever keeps the error keeps what the failed call had: of a pass that ran out of memory, all that filled it.
    """
    for each in causes(error, implicit=True):
        traceback.clear_frames(each.__traceback__)
