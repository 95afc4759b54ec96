"""Changes to the whole process that several tasks make at the same time."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVarTuple

Ts = TypeVarTuple("Ts")


def entered_once(change: Callable[[*Ts], Iterator[None]]) -> Callable[[*Ts], AbstractContextManager[None]]:
    """``contextmanager`` for uses that overlap: the first to enter makes the change, the last to leave undoes it.

    With a plain one, whoever leaves first undoes the change under the others, and whoever leaves last restores what the
    first had changed. Uses with other (hashable) arguments are changes of their own.
    """
    make = contextmanager(change)
    lock = threading.Lock()
    made: dict[object, tuple[AbstractContextManager[None], int]] = {}

    @contextmanager
    @functools.wraps(change)
    def shared(*args: *Ts) -> Iterator[None]:
        with lock:
            entered, inside = made.get(args) or (make(*args), 0)
            if inside == 0:
                entered.__enter__()
            made[args] = entered, inside + 1
        try:
            yield
        finally:
            with lock:
                entered, inside = made.pop(args)
                if inside > 1:
                    made[args] = entered, inside - 1
                else:
                    entered.__exit__(None, None, None)

    return shared
