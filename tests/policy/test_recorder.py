"""Which calls the recorder keeps, and the seeds it gives."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from nat_plugin_evsys.calls import Call
from nat_plugin_evsys.policy.recorder import Recorder


def call(run_id: str | None, number: int = 0) -> Call:
    fields: dict[str, Any] = dict(step_id=None, policy_version=0, prompt_ids=[1], output_ids=[2], logprobs=[-1.0])
    fields |= dict(
        stop_reason="stop", temperature=1.0, top_p=1.0, messages=[], tools=[], reply={}, sequence=-1, index=0
    )
    return Call(call_id=f"c{number}", run_id=run_id, **fields)


def test_calls_of_open_runs_are_kept_in_order_of_arrival() -> None:
    recorder = Recorder()
    recorder.open_run("a", "rollout", 1)
    recorder.open_run("b", "evaluation", None)
    for number, run in enumerate("abab"):
        recorder.record(call(run, number))
    assert recorder.kind_of("a") == "rollout"
    assert recorder.kind_of("b") == "evaluation"
    kept = recorder.close_run("a")
    assert [(c.call_id, c.sequence) for c in kept] == [("c0", 0), ("c2", 2)]
    assert [c.call_id for c in recorder.close_run("b")] == ["c1", "c3"]
    assert recorder.totals.calls == 4
    assert recorder.kind_of("a") is None


def test_other_calls_are_counted_only_while_a_run_is_open() -> None:
    recorder = Recorder()
    recorder.record(call(None))
    recorder.record(call("gone"))
    assert recorder.totals.unattributed == 0
    recorder.open_run("a", "rollout", None)
    recorder.record(call(None))
    recorder.record(call("gone"))
    assert recorder.totals.unattributed == 2
    assert recorder.totals.calls == 0
    assert recorder.close_run("a") == []


def test_the_first_call_of_a_run_is_told_once() -> None:
    recorder, told = Recorder(), []
    recorder.open_run("a", "rollout", None, lambda: told.append("a"))
    recorder.open_run("b", "rollout", None)
    for run in (None, "gone", "b", "a", "a"):
        recorder.begin_call(run)
    assert told == ["a"]


def test_runs_are_opened_once_and_closed_once() -> None:
    recorder = Recorder()
    recorder.open_run("a", "rollout", None)
    with pytest.raises(ValueError, match="already open"):
        recorder.open_run("a", "rollout", None)
    recorder.close_run("a")
    for method in (recorder.close_run, recorder.failures):
        with pytest.raises(ValueError, match="not open"):
            method("a")


def test_failures_belong_to_their_run() -> None:
    recorder = Recorder()
    recorder.open_run("a", "rollout", None)
    recorder.fail("a", "engine_error", "out of memory")
    recorder.fail(None, "engine_error", "elsewhere")
    recorder.fail("gone", "engine_error", "elsewhere")
    assert [str(failure) for failure in recorder.failures("a")] == ["engine_error: out of memory"]
    assert recorder.totals.failures == 3


def test_seeds_do_not_depend_on_what_other_runs_do() -> None:
    def seeds(order: str) -> dict[str, list[int | None]]:
        recorder = Recorder()
        recorder.open_run("a", "rollout", 5)
        recorder.open_run("b", "rollout", 6)
        given: dict[str, list[int | None]] = {"a": [], "b": []}
        for run in order:
            given[run].append(recorder.next_seed(run))
        return given

    assert seeds("aabb") == seeds("abab") == seeds("bbaa")
    all_seeds = [seed for run in seeds("aabb").values() for seed in run]
    assert len(set(all_seeds)) == 4
    assert all(seed is not None and 0 <= seed < 2**31 for seed in all_seeds)


def test_no_seed_without_a_seeded_run() -> None:
    recorder = Recorder()
    recorder.open_run("a", "rollout", None)
    assert recorder.next_seed("a") is None
    assert recorder.next_seed("unknown") is None
    assert recorder.next_seed(None) is None


def test_threads() -> None:
    recorder = Recorder()
    recorder.open_run("a", "rollout", 0)
    seeds: list[int | None] = []

    def work() -> None:
        for _ in range(200):
            recorder.record(call("a"))
            seeds.append(recorder.next_seed("a"))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(seeds)) == 1600
    assert [c.sequence for c in recorder.close_run("a")] == list(range(1600))
