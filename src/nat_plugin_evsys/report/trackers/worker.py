"""A tracker in its own thread: its failures block nothing, are counted, and end no run."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from nat_plugin_evsys.report.trackers.base import Axis, Ending, Table, TrackedRun, Tracker

logger = logging.getLogger(__name__)

_Job = Callable[[], None]


@dataclass(slots=True)
class TrackerCount:
    """What became of a tracker's records; each is a table, or metrics at one point.

    Attributes:
        where: where to find the run, once it is open.
        lost: records that the tracker did not accept.
        error: why the first of them was lost.
    """

    where: str | None = None
    sent: int = 0
    lost: int = 0
    error: str | None = None


class TrackerWorker:
    """One tracker of one run. Any thread may call; only the worker's thread calls the tracker itself.

    Args:
        name: what the YAML calls the tracker.
    """

    def __init__(self, name: str, tracker: Tracker, run: TrackedRun) -> None:
        self.name = name
        self.count = TrackerCount()
        self._tracker = tracker
        self._open = False
        self._waiting = 0
        self._lock = threading.Lock()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._jobs.put(lambda: self._begin(run))
        # A daemon: a library that hangs must not keep the process alive.
        self._thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def metrics(self, values: Mapping[str, float], axis: Axis, at: int) -> None:
        """See Tracker; returns at once."""
        self._record(lambda: self._tracker.metrics(values, axis, at))

    def table(self, table: Table) -> None:
        """See Tracker; returns at once."""
        self._record(lambda: self._tracker.table(table))

    def close(self, ending: Ending, timeout: float) -> None:
        """Wait (at most ``timeout`` seconds) until everything is sent and the run has ended; the rest is lost."""
        self._jobs.put(lambda: self._end(ending))
        self._jobs.put(None)
        self._thread.join(timeout)
        if self._thread.is_alive():
            with self._lock:
                self.count.lost += self._waiting
                self.count.error = self.count.error or f"it took no more records within {timeout:g} s"
                self._waiting = 0

    def _record(self, send: _Job) -> None:
        with self._lock:
            self._waiting += 1
        self._jobs.put(lambda: self._send(send))

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()

    def _begin(self, run: TrackedRun) -> None:
        try:
            where = self._tracker.open(run)
        except BaseException as error:  # noqa: BLE001 - libraries exit where they should raise; it is told and counted
            self._failed(error, lost=0)
            return
        self._open = True
        with self._lock:
            self.count.where = where

    def _send(self, send: _Job) -> None:
        error: BaseException | None = None
        if self._open:
            try:
                send()
            except BaseException as caught:  # noqa: BLE001 - as above
                error = caught
        with self._lock:
            if not self._waiting:
                return  # close() has given up and counted it as lost
            self._waiting -= 1
            self.count.sent += self._open and error is None
        if error is not None or not self._open:
            self._failed(error, lost=1)

    def _end(self, ending: Ending) -> None:
        if self._open:
            try:
                self._tracker.close(ending)
            except BaseException as error:  # noqa: BLE001 - as above
                self._failed(error, lost=0)

    def _failed(self, error: BaseException | None, lost: int) -> None:
        with self._lock:
            self.count.lost += lost
            if error is not None and self.count.error is None:
                self.count.error = " ".join(f"{type(error).__name__}: {error}".split())
                logger.debug("tracker %s failed", self.name, exc_info=error)
