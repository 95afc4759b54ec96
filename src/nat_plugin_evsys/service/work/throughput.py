"""How much work was done, and how fast recently."""

from __future__ import annotations

import threading
import time
from collections import deque

_WINDOW_S = 60.0


class Throughput:
    """Counts tokens. Safe to use from several threads.

    Attributes:
        total: since the server started.
    """

    def __init__(self) -> None:
        self.total = 0
        self._lock = threading.Lock()
        self._recent: deque[tuple[float, int]] = deque()

    def add(self, tokens: int) -> None:
        """Count tokens as done now."""
        with self._lock:
            self.total += tokens
            self._recent.append((time.monotonic(), tokens))
            self._prune()

    def rate(self) -> float:
        """Tokens per second over the last minute."""
        with self._lock:
            self._prune()
            return sum(tokens for _, tokens in self._recent) / _WINDOW_S

    def _prune(self) -> None:
        oldest = time.monotonic() - _WINDOW_S
        while self._recent and self._recent[0][0] < oldest:
            self._recent.popleft()
