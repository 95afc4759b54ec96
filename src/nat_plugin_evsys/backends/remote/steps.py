"""Counts the optimizer steps that a service has taken for a backend; the protocol does not say."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any

from nat_plugin_evsys.errors import EvsysError


class Steps:
    """The optimizer steps that were submitted up to some moment.

    Args:
        before: those up to the moment before, or how many of them the service took.
        last: the one since then, which may be awaited more than once.
    """

    def __init__(self, before: Steps | int, last: Awaitable[Any] | None = None) -> None:
        self._before = before
        self._last = last

    async def taken(self) -> int:
        """How many the service took, once it has ended all of them; a refused step does not count."""
        steps: list[Awaitable[Any]] = []
        before: Steps | int = self
        while isinstance(before, Steps):
            if before._last is not None:
                steps.append(before._last)
            before = before._before
        taken = before + sum([await _succeeded(step) for step in reversed(steps)])
        self._before, self._last = taken, None
        return taken


class StepCount:
    """Counts the optimizer steps that the service has confirmed.

    A service runs the operations of a model in order, so that the steps in an operation's weights are those in ``now``
    when it is submitted. A checkpoint that another process saved counts as 0 steps: the service does not say how many
    made it.

    Attributes:
        now: the steps submitted so far.
    """

    def __init__(self) -> None:
        self.now = Steps(0)
        self._saved: dict[str, int] = {}

    def submitted(self, step: Awaitable[Any]) -> None:
        """Record that an optim_step was handed to the service."""
        self.now = Steps(self.now, step)

    async def saved(self, path: str, steps: Steps) -> None:
        """Record a checkpoint, with what ``now`` was when its saving was submitted."""
        self._saved[path] = await steps.taken()

    def of(self, path: str) -> int:
        """Steps that made a checkpoint."""
        return self._saved.get(path, 0)

    def restart_from(self, path: str) -> None:
        """Record that the weights are now those of a checkpoint."""
        self.now = Steps(self.of(path))


async def _succeeded(step: Awaitable[Any]) -> bool:
    try:
        await step
    except EvsysError:  # told to whoever awaits the step itself
        return False
    return True
