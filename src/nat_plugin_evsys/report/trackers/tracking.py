"""All trackers of one run: what they receive, what arrived, and where to find it."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from nat_plugin_evsys.report.replies import Reply
from nat_plugin_evsys.report.trackers.base import Axis, Ending, Table, TrackedRun, Tracker
from nat_plugin_evsys.report.trackers.worker import TrackerWorker

CLOSE_TIMEOUT = 60.0
"""Seconds that a tracker has at the end of a run to send what is left."""

SAMPLES = 100
"""Held-out replies in one table."""

COLUMNS = ("row", "question", "wanted", "reply", "reward", "verdict")

GROUPS = {"job": None, "replies": "replies", "staleness": "staleness", "prompts": "prompts"}
"""Parts of an epoch's row that stand in a group of their own, or (None) are taken apart."""


class Tracking:
    """Gives every tracker the same records, and reports the first failure of each once.

    Args:
        trackers: by name, checked.
        tell: shows a line to the person who watches the run.
    """

    def __init__(self, trackers: Mapping[str, Tracker], run: TrackedRun, tell: Callable[[str], None]) -> None:
        self._workers = [TrackerWorker(name, tracker, run) for name, tracker in trackers.items()]
        self._tell = tell
        self._told: set[str] = set()
        self._closed = False
        self._prefix = ""

    def of_policy(self, name: str) -> Tracking:
        """The same trackers for a further policy of the run: what they receive has names that start with its name."""
        part = copy.copy(self)
        part._prefix = f"{name}/"
        return part

    def warm_start(self, metrics: Mapping[str, Any]) -> None:
        """The result of the warm start."""
        self._metrics(_named("warm_start", metrics), "epoch", 0)

    def step(self, number: int, metrics: Mapping[str, Any]) -> None:
        """One optimizer step.

        Args:
            number: optimizer steps taken in the run, this one included.
            metrics: by Tinker's names.
        """
        self._metrics(_named("step", metrics), "optimizer_step", number)

    def epoch(self, number: int, row: Mapping[str, Any]) -> None:
        """An epoch's row of metrics.jsonl."""
        values = _named("epoch", {name: value for name, value in row.items() if name not in GROUPS})
        for name, group in GROUPS.items():
            if group is not None:
                values |= _named(group, row.get(name) or {})
        job = row.get("job") or {}
        values |= _named("training", job.get("metrics") or {}) | _named("dropped", job.get("dropped") or {})
        self._metrics(values, "epoch", number)

    def validation(self, kind: str, epochs_done: int, reward: float, replies: Sequence[Reply]) -> None:
        """The reward on the held-out rows, and the replies to them.

        Args:
            kind: ``heldout``, or ``base`` for the model before its warm start.
        """
        self._metrics({f"{kind}/reward": reward}, "epoch", epochs_done)
        rows = [
            (each.row, each.question, each.expected, each.text, each.reward, each.verdict) for each in replies[:SAMPLES]
        ]
        for worker in self._workers:
            worker.table(Table(f"{self._prefix}{kind}/samples", epochs_done, COLUMNS, rows))
        self._tell_failures()

    def close(self, ending: Ending, timeout: float = CLOSE_TIMEOUT) -> None:
        """Wait until everything is sent, or ``timeout`` seconds for each. Later calls do nothing."""
        if self._closed:
            return
        self._closed = True
        for worker in self._workers:
            worker.close(ending, timeout)
        self._tell_failures()

    def counts(self) -> dict[str, dict[str, Any]]:
        """``{"wandb": {"where": …, "sent": n, "lost": n, "error": …}}``, for summary.json."""
        return {worker.name: asdict(worker.count) for worker in self._workers}

    def _metrics(self, values: Mapping[str, float], axis: Axis, at: int) -> None:
        values = {f"{self._prefix}{name}": value for name, value in values.items()}
        if values:
            for worker in self._workers:
                worker.metrics(values, axis, at)
        self._tell_failures()

    def _tell_failures(self) -> None:
        for worker in self._workers:
            if worker.count.error is not None and worker.name not in self._told:
                self._told.add(worker.name)
                self._tell(
                    f"! tracker {worker.name}: {worker.count.error}\n"
                    "  The run continues; summary.json counts the lost records."
                )


def _named(group: str, values: Mapping[str, Any]) -> dict[str, float]:
    """``{"loss:sum": 1}`` -> ``{"step/loss_sum": 1.0}``: finite numbers, under names that every tracker accepts."""
    return {f"{group}/{re.sub(r'[^A-Za-z0-9_./-]', '_', name)}": value for name, value in _numbers(values)}


def _numbers(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            yield f"{prefix}{name}", float(value)
