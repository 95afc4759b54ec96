"""Counts the optimizer steps that a service has taken for a backend; the protocol does not say."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any

from nat_plugin_evsys.errors import EvsysError


class StepCount:
    """Counts the optimizer steps that the service has confirmed.

    A service runs the operations of a model in order, so that once a later one is done, each step before it has ended.
    A checkpoint that another process saved counts as 0 steps: the service does not say how many made it.
    """

    def __init__(self) -> None:
        self._taken = 0
        self._open: list[Awaitable[Any]] = []
        self._saved: dict[str, int] = {}

    def submitted(self, step: Awaitable[Any]) -> None:
        """Record that an optim_step was handed to the service."""
        self._open.append(step)

    async def settled(self) -> int:
        """Steps taken, once everything submitted so far has ended; a refused step does not count."""
        steps, self._open = self._open, []
        for step in steps:
            try:
                await step
            except EvsysError:  # told to whoever awaits the step itself
                continue
            self._taken += 1
        return self._taken

    async def saved(self, path: str) -> None:
        """Record a checkpoint saved after everything submitted so far."""
        self._saved[path] = await self.settled()

    def of(self, path: str) -> int:
        """Steps that made a checkpoint."""
        return self._saved.get(path, 0)

    def restart_from(self, path: str) -> None:
        """Record that the weights are now those of a checkpoint."""
        self._taken, self._open = self.of(path), []
