"""From the sampler's thread to an event loop, which is woken once for all that has arrived since it last looked."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary


class LoopInbox:
    """Calls that other threads leave for one event loop.

    ``call_soon_threadsafe`` writes to a socket, which hands over the interpreter: with a call for each token of a full
    batch the sampler and the loop would do little but wait for each other.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: list[tuple[Callable[[Any], None], Any]] = []

    @staticmethod
    def of(loop: asyncio.AbstractEventLoop) -> LoopInbox:
        """The loop's only one."""
        return _INBOXES.setdefault(loop, LoopInbox())

    def call(self, loop: asyncio.AbstractEventLoop, take: Callable[[Any], None], item: Any) -> None:
        """Let the loop call ``take(item)`` soon, in the order of these calls. Nothing happens if it has ended."""
        with self._lock:
            self._calls.append((take, item))
            if len(self._calls) > 1:
                return
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(self._deliver, loop)

    def _deliver(self, loop: asyncio.AbstractEventLoop) -> None:
        with self._lock:
            calls, self._calls = self._calls, []
        for take, item in calls:
            loop.call_soon(take, item)  # one that raises keeps nothing from the others


_INBOXES: WeakKeyDictionary[asyncio.AbstractEventLoop, LoopInbox] = WeakKeyDictionary()
