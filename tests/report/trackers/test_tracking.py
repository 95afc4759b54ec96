"""What trackers are given; one that hangs or fails is counted, told once, and waited for no longer than said."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from nat_plugin_evsys.errors import ConfigError
from nat_plugin_evsys.report.replies import Reply
from nat_plugin_evsys.report.trackers.base import Axis, Ending, Table, TrackedRun
from nat_plugin_evsys.report.trackers.create import create_tracker
from nat_plugin_evsys.report.trackers.extras import require_extra
from nat_plugin_evsys.report.trackers.tracking import Tracking


class ListTracker:
    """A tracker that keeps what it gets."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.threads: set[str] = set()

    def check(self) -> None: ...

    def open(self, run: TrackedRun) -> str:
        self._note("open", run.name)
        return "http://here"

    def metrics(self, values: Mapping[str, float], axis: Axis, at: int) -> None:
        self._note("metrics", dict(values), axis, at)

    def table(self, table: Table) -> None:
        self._note("table", table)

    def close(self, ending: Ending) -> None:
        self._note("close", ending)

    def _note(self, *call: Any) -> None:
        self.calls.append(call)
        self.threads.add(threading.current_thread().name)


class NotThere(ListTracker):
    def open(self, run: TrackedRun) -> str:
        raise ConnectionError("no route\nto host")


class FailsOnce(ListTracker):
    def metrics(self, values: Mapping[str, float], axis: Axis, at: int) -> None:
        if at == 1:
            raise TimeoutError("the server was slow")
        super().metrics(values, axis, at)


class Exits(ListTracker):
    def open(self, run: TrackedRun) -> str:
        raise SystemExit("a library that ends the process")


class Hangs(ListTracker):
    def __init__(self) -> None:
        super().__init__()
        self.let_go = threading.Event()

    def metrics(self, values: Mapping[str, float], axis: Axis, at: int) -> None:
        self.let_go.wait(60)
        super().metrics(values, axis, at)


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def hanging() -> Iterator[Hangs]:
    tracker = Hangs()
    yield tracker
    tracker.let_go.set()


def test_every_record_in_order_from_one_thread(run: TrackedRun, told: list[str]) -> None:
    tracker = ListTracker()
    tracking = Tracking({"list": tracker}, run, told.append)
    tracking.warm_start({"steps": 3, "loss_last": 0.5, "algorithm": "sft"})
    tracking.step(7, {"loss:sum": -2.5, "ratio:mean": 1.0, "grad_norm": float("nan")})
    tracking.epoch(
        2,
        {
            "event": "epoch",
            "reward_mean": 0.5,
            "loss": None,
            "errors": {},
            "staleness": {"0": 4},
            "replies": {"tokens_mean": 3.5, "reward_min": None},
            "findings": [{"id": "cut_off"}],
            "job": {"job_id": "x", "metrics": {"loss:sum": 1}, "dropped": {"zero_variance_group": 8}, "steps": 2},
        },
    )
    replies = [Reply(f"row-{number}", "Q?", None, "A", 1.0, "right", 1, 1, 0) for number in range(120)]
    tracking.validation("heldout", 2, 0.25, replies)
    tracking.close("finished")
    tracking.close("failed")

    *records, table, ending = tracker.calls
    assert records == [
        ("open", "run-1"),
        ("metrics", {"warm_start/steps": 3.0, "warm_start/loss_last": 0.5}, "epoch", 0),
        ("metrics", {"step/loss_sum": -2.5, "step/ratio_mean": 1.0}, "optimizer_step", 7),
        (
            "metrics",
            {
                "epoch/reward_mean": 0.5,
                "replies/tokens_mean": 3.5,
                "staleness/0": 4.0,
                "training/loss_sum": 1.0,
                "dropped/zero_variance_group": 8.0,
            },
            "epoch",
            2,
        ),
        ("metrics", {"heldout/reward": 0.25}, "epoch", 2),
    ]
    assert table[1].columns == ("row", "question", "wanted", "reply", "reward", "verdict")
    assert table[1].rows[0] == ("row-0", "Q?", None, "A", 1.0, "right")
    assert len(table[1].rows) == 100
    assert ending == ("close", "finished")
    assert tracker.threads == {"tracker-list"}
    assert tracking.counts() == {"list": {"where": "http://here", "sent": 5, "lost": 0, "error": None}}
    assert told == []


@pytest.mark.parametrize(
    ("tracker", "error", "sent"),
    [
        (NotThere(), "ConnectionError: no route to host", 0),
        (Exits(), "SystemExit: a library that ends the process", 0),
        (FailsOnce(), "TimeoutError: the server was slow", 2),
    ],
)
def test_what_cannot_be_reached_is_told_once_and_counted(
    tracker: ListTracker, error: str, sent: int, run: TrackedRun, told: list[str]
) -> None:
    fine = ListTracker()
    tracking = Tracking({"bad": tracker, "fine": fine}, run, told.append)
    for step in (1, 2, 3):
        tracking.step(step, {"loss": 1.0})
    tracking.close("finished")
    counts = tracking.counts()
    assert (counts["bad"]["sent"], counts["bad"]["lost"], counts["bad"]["error"]) == (sent, 3 - sent, error)
    assert (counts["fine"]["sent"], counts["fine"]["lost"]) == (3, 0)
    assert len(told) == 1
    assert told[0].startswith(f"! tracker bad: {error}\n")


def test_a_tracker_that_hangs_holds_up_nothing(hanging: Hangs, run: TrackedRun, told: list[str]) -> None:
    tracking = Tracking({"slow": hanging}, run, told.append)
    started = time.monotonic()
    for step in range(50):
        tracking.step(step, {"loss": 1.0})
    tracking.close("finished", timeout=0.3)
    assert time.monotonic() - started < 10
    count = tracking.counts()["slow"]
    assert (count["sent"], count["lost"], count["error"]) == (0, 50, "it took no more records within 0.3 s")
    assert len(told) == 1
    hanging.let_go.set()
    deadline = time.monotonic() + 10
    while hanging.calls[-1] != ("close", "finished"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert tracking.counts()["slow"]["lost"] == 50  # what was given up stays counted as lost


def test_without_trackers_nothing_happens(run: TrackedRun, told: list[str]) -> None:
    tracking = Tracking({}, run, told.append)
    tracking.step(1, {"loss": 1.0})
    tracking.close("finished")
    assert tracking.counts() == {}


def test_an_unknown_tracker_and_one_that_is_not_installed() -> None:
    with pytest.raises(ConfigError, match="there are tensorboard, wandb and mlflow"):
        create_tracker("excel")
    with pytest.raises(ConfigError, match=r"pip install 'nat_plugin_evsys\[mlflow\]'"):
        require_extra("mlflow_that_is_not_there", "mlflow")
