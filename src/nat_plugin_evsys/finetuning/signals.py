"""SIGTERM as a cancellation, so that a killed run cleans up and stays resumable."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def sigterm_cancels() -> Iterator[None]:
    """Within it, SIGTERM cancels the current task; the process then exits with 143, as an uncaught SIGTERM would.

    NAT runs no cleanup on SIGTERM of its own. Outside the main thread, or if the loop supports no signal handlers, the
    signal keeps its default effect.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    received = False

    def cancel() -> None:
        nonlocal received
        received = True
        if task is not None:
            task.cancel()

    try:
        loop.add_signal_handler(signal.SIGTERM, cancel)
    except (NotImplementedError, RuntimeError, ValueError):
        yield
        return
    try:
        yield
    except asyncio.CancelledError:
        if received:
            loop.set_exception_handler(_without_the_exit)
            sys.exit(128 + signal.SIGTERM)
        raise
    finally:
        loop.remove_signal_handler(signal.SIGTERM)


def _without_the_exit(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """asyncio logs the exit as a task's exception that nobody retrieved, with a hundred lines of traceback."""
    if not isinstance(context.get("exception"), SystemExit):
        loop.default_exception_handler(context)
