"""Rollouts take turns to begin."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

from nat_plugin_evsys.finetuning.workflow.start_gate import StartGate

LONG = 60.0


async def begin(gate: StartGate, count: int) -> tuple[list[asyncio.Task[Callable[[], None]]], int]:
    """Tasks that each want a turn, and how many have one."""
    tasks = [asyncio.create_task(gate.take()) for _ in range(count)]
    return tasks, await taken(tasks)


async def taken(tasks: list[asyncio.Task[Callable[[], None]]]) -> int:
    for _ in range(20):
        await asyncio.sleep(0)
    return sum(task.done() for task in tasks)


async def give_up(tasks: list[asyncio.Task[Callable[[], None]]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_so_many_turns_are_taken_at_a_time() -> None:
    tasks, started = await begin(StartGate(at_once=2, patience=LONG), 5)
    assert started == 2
    tasks[0].result()()
    assert await taken(tasks) == 3
    await give_up(tasks)


async def test_a_turn_ends_once() -> None:
    tasks, _ = await begin(StartGate(at_once=1, patience=LONG), 4)
    for _ in range(3):
        tasks[0].result()()
    assert await taken(tasks) == 2
    await give_up(tasks)


async def test_a_turn_may_end_in_another_thread() -> None:
    tasks, _ = await begin(StartGate(at_once=1, patience=LONG), 2)
    thread = threading.Thread(target=tasks[0].result())
    thread.start()
    thread.join()
    assert await taken(tasks) == 2


async def test_a_turn_that_nobody_ends_ends_by_itself_and_only_once() -> None:
    tasks, _ = await begin(StartGate(at_once=1, patience=0.01), 3)
    end = await tasks[0]
    await tasks[1]
    end()
    await asyncio.wait_for(tasks[2], 10)


async def test_whoever_gives_up_waiting_takes_no_turn() -> None:
    tasks, _ = await begin(StartGate(at_once=1, patience=LONG), 3)
    await give_up(tasks[1:2])
    tasks[0].result()()
    await asyncio.wait_for(tasks[2], 10)


def test_a_turn_may_end_after_its_event_loop() -> None:
    asyncio.run(StartGate().take())()
