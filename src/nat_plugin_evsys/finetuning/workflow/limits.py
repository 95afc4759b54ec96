"""What a tool or an evaluator cannot do to a run: end its process, or take for ever."""

from __future__ import annotations

import asyncio
import functools
import sys
import traceback
from collections.abc import Coroutine, Iterator
from contextlib import AbstractContextManager
from typing import Any

from nat_plugin_evsys.overlapping import entered_once

_SCORES_ONE = ("evaluate_item", "evaluate_atif_item")
"""Methods by which NAT's base classes score one rollout."""


def exits_are_errors() -> AbstractContextManager[None]:
    """Turn SystemExit into RuntimeError in every task of the running loop that is made inside.

    An event loop lets SystemExit of a task end the process. Agents run their tools in tasks of their own, where nobody
    else can catch it.
    """
    return _exits_are_errors(asyncio.get_running_loop())


@entered_once
def _exits_are_errors(loop: asyncio.AbstractEventLoop) -> Iterator[None]:
    before = loop.get_task_factory()

    def make(loop: asyncio.AbstractEventLoop, work: Any, **options: Any) -> Any:
        guarded = _guarded(work)
        return asyncio.Task(guarded, loop=loop, **options) if before is None else before(loop, guarded, **options)

    loop.set_task_factory(make)
    try:
        yield
    finally:
        loop.set_task_factory(before)


async def _guarded(work: Coroutine[Any, Any, Any]) -> Any:
    try:
        return await work
    except SystemExit as error:
        raise exit_error(error) from error


def exit_error(error: SystemExit) -> RuntimeError:
    """The error that stands for it; it says where the exit was."""
    hook = getattr(sys.exit, "__code__", None)  # wandb puts a method of its own in place of the built-in function
    *_, (frame, line) = (each for each in traceback.walk_tb(error.__traceback__) if each[0].f_code is not hook)
    code = frame.f_code
    return RuntimeError(f"sys.exit({error.code!r}) was called, in {code.co_name} ({code.co_filename}:{line})")


def bound_items(evaluator: Any, seconds: float) -> None:
    """Let an evaluator that scores rollouts one by one fail at those that take longer; others are left as they are.

    Args:
        evaluator: what NAT's builder gives: it has the evaluating function, a method of the evaluator itself.
    """
    for name in ("evaluate_fn", "evaluate_atif_fn"):
        owner = getattr(getattr(evaluator, name, None), "__self__", None)
        for method in _SCORES_ONE:
            if (score := getattr(owner, method, None)) is not None:
                setattr(owner, method, functools.partial(_in_time, score, seconds))


async def _in_time(score: Any, seconds: float, *args: Any, **options: Any) -> Any:
    try:
        async with asyncio.timeout(seconds) as deadline:
            return await score(*args, **options)
    except TimeoutError as error:
        if not deadline.expired():
            raise
        raise TimeoutError(
            f"no score after {seconds:g} s; raise evaluator_timeout of the trajectory builder"
        ) from error
