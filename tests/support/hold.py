"""Holds a sampler in the middle of its work."""

from __future__ import annotations

import threading


class Hold:
    """An ``on_tokens`` of a request: the sampler stops at its first token until ``release``."""

    def __init__(self, timeout: float = 60.0) -> None:
        self._timeout = timeout
        self._reached, self._released = threading.Event(), threading.Event()

    def __call__(self, *_: object) -> None:
        self._reached.set()
        self._released.wait(self._timeout)

    def wait(self) -> None:
        """Until the sampler is held: what is asked for from now on waits together."""
        assert self._reached.wait(self._timeout), "the request has no token yet"

    def release(self) -> None:
        """Let the sampler go on."""
        self._released.set()
