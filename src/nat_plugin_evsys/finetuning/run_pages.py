"""``rewards.png`` and ``report.html`` of a run, kept up to date during the run."""

from __future__ import annotations

import logging
import queue
import threading
import time
import weakref
from collections.abc import Callable

from nat_plugin_evsys.report.metrics_log import MetricsLog
from nat_plugin_evsys.report.page import Report
from nat_plugin_evsys.report.plot import plot_rewards
from nat_plugin_evsys.runs import RunDirectory

logger = logging.getLogger(__name__)

# A drawing takes a quarter of a second of the interpreter, the first one over a second; rollouts need it, too.
_PLOT_INTERVAL = 60.0

_REPORT_SHARE = 0.1
"""Largest share of a run's time in which its report is being written: short epochs skip one now and then."""

_PATIENCE = 10.0
"""Seconds that whoever stops a run waits for its last report."""

_Jobs = queue.SimpleQueue[Callable[[], None] | None]


class RunPages:
    """Writes both in a thread, while the run continues. Failures are logged and do not end the run.

    It is one thread for all of the run: matplotlib opens its fonts anew for every thread, and keeps up to 64 open.
    """

    def __init__(self, run_dir: RunDirectory, metrics: MetricsLog) -> None:
        self._run_dir = run_dir
        self._metrics = metrics
        self._report = Report([run_dir.path])
        self._plot_after = time.monotonic() + _PLOT_INTERVAL
        self._report_after = 0.0
        self._writing: threading.Event | None = None
        self._jobs: _Jobs = queue.SimpleQueue()
        weakref.finalize(self, self._jobs.put, None)
        # A daemon: a large report must not keep the process of a stopped run alive.
        threading.Thread(target=_work, args=(self._jobs,), name="evsys-report", daemon=True).start()

    def after_epoch(self) -> None:
        """The state, the metrics and the rollouts of an epoch are on disk. Returns at once."""
        busy = self._writing is not None and not self._writing.is_set()
        now = time.monotonic()
        if busy or now < min(self._plot_after, self._report_after):
            return
        due = [self._write_report] if now >= self._report_after else []
        due += [self._plot] if now >= self._plot_after else []
        self._writing = self._submit(due)

    def write(self) -> None:
        """Write both a last time: the run has ended as planned."""
        self._submit([self._plot, self._write_report]).wait()

    def write_in_time(self, patience: float = _PATIENCE) -> None:
        """Write both a last time, but wait no more than ``patience`` seconds: the run was stopped, or has failed."""
        if not self._submit([self._plot, self._write_report]).wait(patience):
            logger.warning(
                "%s does not show yet how the run ended: writing it takes longer than %g s. Type: nat evsys report %s",
                self._run_dir.report_path,
                patience,
                self._run_dir.path,
            )

    def _submit(self, writers: list[Callable[[], None]]) -> threading.Event:
        """Write when what was submitted before is written; returns what is set then."""
        done = threading.Event()

        def write() -> None:
            try:
                _all(writers)
            finally:
                done.set()

        self._jobs.put(write)
        return done

    def _plot(self) -> None:
        plot_rewards(self._metrics.rows(), self._run_dir.plot_path)
        self._plot_after = time.monotonic() + _PLOT_INTERVAL

    def _write_report(self) -> None:
        started = time.monotonic()
        self._report.write(self._run_dir.report_path)
        ended = time.monotonic()
        self._report_after = ended + (ended - started) / _REPORT_SHARE


def _work(jobs: _Jobs) -> None:
    while (job := jobs.get()) is not None:
        job()
        del job  # it holds the pages, with which the thread ends


def _all(writers: list[Callable[[], None]]) -> None:
    for write in writers:
        try:
            write()
        except Exception:  # a picture of the run must not end it; the log has the cause
            logger.warning("%s failed; the run continues", write.__name__.strip("_"), exc_info=True)
