"""What an error leaves behind once it has been dealt with, and what the garbage collector is spared."""

from __future__ import annotations

import asyncio
import gc
import traceback
import weakref
from asyncio import futures
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from nat_plugin_evsys.engine.gradient.operations import OperationFuture, OperationQueue
from nat_plugin_evsys.errors import Refusal
from nat_plugin_evsys.garbage import gc_frozen, let_go


class Body:
    """Something large that a failing function holds."""


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def fail(body: Body, because: type[Exception] | None) -> None:
    try:
        if because is not None:
            raise because
    except Exception as error:
        raise Refusal(413, "too large") from error
    raise Refusal(413, "too large")


async def refused(body: Body, because: type[Exception] | None) -> Refusal | None:
    """The error of a future such as NAT's process has: in Python, where the traceback leads back to the future."""
    future: asyncio.Future[None] = futures._PyFuture(loop=asyncio.get_running_loop())  # type: ignore[attr-defined]
    with ThreadPoolExecutor(1) as pool:
        failed = pool.submit(fail, body, because).exception()
    assert failed is not None
    future.set_exception(failed)
    try:
        await future
    except Refusal as error:
        return error
    return None


@pytest.mark.parametrize("because", [None, KeyError])
@pytest.mark.parametrize("lets_go", [True, False])
def test_what_a_failed_request_held_is_free_at_once(
    no_collector: None, because: type[Exception] | None, lets_go: bool
) -> None:
    body = Body()
    held = weakref.ref(body)
    error = asyncio.run(refused(body, because))
    assert error is not None
    if lets_go:
        let_go(error)
    del body, error
    assert (held() is None) == lets_go


@pytest.mark.parametrize("fails", [False, True])
def test_objects_are_collected_again_afterwards(fails: bool) -> None:
    before = gc.get_freeze_count()
    try:
        with gc_frozen():
            assert gc.get_freeze_count() > before + 1000
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        assert fails
    assert gc.get_freeze_count() == 0


def test_what_is_garbage_already_is_not_frozen() -> None:
    ring = [Body()]
    ring.append(ring)  # type: ignore[arg-type]
    held = weakref.ref(ring[0])
    del ring
    with gc_frozen():
        assert held() is None


@pytest.mark.parametrize("because", [None, KeyError])
def test_the_error_of_an_operation_says_where_it_failed_and_holds_nothing_of_it(
    no_collector: None, because: type[Exception] | None
) -> None:
    held = []

    def operation(future: OperationFuture[None]) -> None:
        body = Body()
        held.append(weakref.ref(body))
        fail(body, because)

    queue = OperationQueue("failing")
    error = queue.submit(operation, OperationFuture[None]()).future().exception(timeout=60)
    queue.close()
    assert held[0]() is None
    assert error is not None
    assert "in fail\n" in "".join(traceback.format_exception(error))
