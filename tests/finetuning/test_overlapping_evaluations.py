"""An evaluation that runs beside another neither ends nor prolongs what holds during the other."""

from __future__ import annotations

import asyncio
import logging
import sys
import warnings

import pytest

from nat_plugin_evsys.finetuning.workflow.evaluation import quiet_nat
from nat_plugin_evsys.finetuning.workflow.limits import exits_are_errors

ORDERS = [pytest.param(True, id="first_ends_first"), pytest.param(False, id="last_ends_first")]


async def leave() -> None:
    sys.exit(3)


@pytest.mark.parametrize("in_order", ORDERS)
async def test_an_exit_is_an_error_until_the_last_evaluation_ends(in_order: bool) -> None:
    loop = asyncio.get_running_loop()
    before = loop.get_task_factory()
    one, other = exits_are_errors(), exits_are_errors()
    one.__enter__()
    other.__enter__()
    first, last = (one, other) if in_order else (other, one)
    first.__exit__(None, None, None)
    with pytest.raises(RuntimeError, match=r"sys.exit\(3\) was called, in leave"):
        await asyncio.create_task(leave())
    last.__exit__(None, None, None)
    assert loop.get_task_factory() is before


async def test_an_exit_is_where_it_was_called_also_under_a_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hooks:
        def exit(self, code: int) -> None:
            raise SystemExit(code)

    monkeypatch.setattr(sys, "exit", Hooks().exit)
    with exits_are_errors(), pytest.raises(RuntimeError, match=r"sys.exit\(3\) was called, in leave"):
        await asyncio.create_task(leave())


def test_each_loop_has_its_own() -> None:
    async def exits() -> None:
        with exits_are_errors(), pytest.raises(RuntimeError, match="was called, in leave"):
            await asyncio.create_task(leave())

    async def beside() -> None:
        with exits_are_errors():
            await asyncio.to_thread(asyncio.run, exits())

    asyncio.run(beside())


@pytest.mark.parametrize("in_order", ORDERS)
def test_nat_is_quiet_until_the_last_evaluation_ends(in_order: bool) -> None:
    runtime, filters = logging.getLogger("nat.runtime"), list(warnings.filters)
    before = runtime.level
    one, other = quiet_nat(), quiet_nat()
    one.__enter__()
    other.__enter__()
    first, last = (one, other) if in_order else (other, one)
    first.__exit__(None, None, None)
    assert runtime.level == logging.CRITICAL
    assert warnings.filters != filters
    last.__exit__(None, None, None)
    assert runtime.level == before
    assert warnings.filters == filters
