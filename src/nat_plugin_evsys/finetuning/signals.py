"""Signals as a cancellation, so that a run which is told to end cleans up and stays resumable."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

NUMBERS: list[int] = [signal.SIGTERM, signal.SIGINT, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]

_SHOW_CURSOR = b"\x1b[?25h"


@contextmanager
def signals_cancel() -> Iterator[None]:
    """Within it SIGTERM, SIGINT or SIGHUP cancels the current task; the process then exits with 128 + the signal.

    Another signal after the first ends the process at once, which loses nothing that was committed. A signal that is
    ignored (SIGHUP under ``nohup``) stays ignored. Outside the main thread, signals keep their effect.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    on_terminal = [stream.fileno() for stream in (sys.__stdout__, sys.__stderr__) if stream and stream.isatty()]
    received: int | None = None

    def cancel(number: int, _: FrameType | None) -> None:
        nonlocal received
        received = number
        for each in before:
            signal.signal(each, _end_now)
        if number == getattr(signal, "SIGHUP", None):
            _forget_terminal(on_terminal)
        if task is not None:
            loop.call_soon_threadsafe(task.cancel)

    before: dict[int, Any] = {}
    try:
        for number in NUMBERS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, cancel)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    except asyncio.CancelledError:
        if received is None:
            raise
        loop.set_exception_handler(_without_the_exit)
        sys.exit(128 + received)
    finally:
        if received is None:
            for number, handler in before.items():
                signal.signal(number, handler)


def _end_now(number: int, _: FrameType | None) -> NoReturn:
    with contextlib.suppress(OSError):
        os.write(2, (_SHOW_CURSOR if os.isatty(2) else b"") + b"\nstopped at once; finished epochs are safe\n")
    os._exit(128 + number)


def _forget_terminal(descriptors: list[int]) -> None:
    """The terminal has gone: writing to it would fail, and hide why the run ended."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in descriptors:
        os.dup2(nowhere, descriptor)
    os.close(nowhere)


def _without_the_exit(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """asyncio logs the exit as a task's exception that nobody retrieved, with a hundred lines of traceback."""
    if not isinstance(context.get("exception"), SystemExit):
        loop.default_exception_handler(context)
