"""Signals end a run cleanly; a second one ends it at once, and neither prints a traceback."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable

import pytest

from nat_plugin_evsys.finetuning.signals import signals_cancel


async def _run(first: int, clean_up: Callable[[], object]) -> None:
    async def work() -> None:
        with signals_cancel():
            try:
                os.kill(os.getpid(), first)
                await asyncio.sleep(60)
            finally:
                clean_up()

    await work()


def _exit_code(first: int, clean_up: Callable[[], object] = lambda: None, ignored: bool = False) -> int:
    """Of a process that gets a signal in its work, and may get another while it cleans up."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the tests may have been started with nohup
                signal.signal(each, signal.SIG_DFL)
            if ignored:
                signal.signal(first, signal.SIG_IGN)
                signal.signal(signal.SIGALRM, lambda *_: os._exit(7))
                signal.setitimer(signal.ITIMER_REAL, 0.2)
            asyncio.set_event_loop(asyncio.new_event_loop())  # the parent's, which NAT's asyncio.run takes, is shared
            asyncio.run(_run(first, clean_up))
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_one_signal_cleans_up_and_a_second_ends_at_once(number: int) -> None:
    assert _exit_code(number) == 128 + number
    assert _exit_code(number, lambda: os._exit(5)) == 5  # so the clean-up runs
    again = _exit_code(number, lambda: (os.kill(os.getpid(), signal.SIGINT), os._exit(5)))
    assert again == 128 + signal.SIGINT


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    assert _exit_code(signal.SIGHUP, ignored=True) == 7
