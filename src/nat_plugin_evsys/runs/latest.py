"""Which run the word ``latest`` means to a person who looks at runs or serves one.

`RunDirectory.newest` is the run that was started last. That is not always the one meant: a run that was interrupted
before its first epoch ended has nothing to show, and must not hide the finished one before it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nat_plugin_evsys.runs.directory import RunDirectory


@dataclass(frozen=True, slots=True)
class LatestRun:
    """A run, and the newer ones that it was preferred to, newest first."""

    run: RunDirectory
    passed_over: list[RunDirectory]

    @property
    def notice(self) -> str | None:
        """The sentence that names both, or None if no newer run was passed over."""
        if not self.passed_over:
            return None
        newer = ", ".join(map(_describe, self.passed_over))
        return f"`latest` is {_describe(self.run)}; newer, but without a trained epoch: {newer}"


def latest_to_show(output_dir: Path | str) -> LatestRun | None:
    """The newest run that was not abandoned before its first epoch ended; if all were, the newest. None without runs.

    A run that is going on or has failed counts: whoever asks wants to see why.
    """
    return _newest(output_dir, lambda run: not _is_abandoned(run)) or _newest(output_dir, lambda run: True)


def latest_to_serve(output_dir: Path | str) -> LatestRun | None:
    """The newest run with a trained checkpoint of a finished epoch; else the newest with one of a warm start.

    None if no run has trained anything.
    """
    return _newest(output_dir, _has_trained_epoch) or _newest(output_dir, lambda run: run.state.has_trained)


def _newest(output_dir: Path | str, fits: Callable[[RunDirectory], bool]) -> LatestRun | None:
    newest = RunDirectory.newest(output_dir)
    if newest is None:
        return None
    others = [run for run in reversed(RunDirectory.all(output_dir)) if run.path != newest.path]
    runs = [newest, *others]
    for number, run in enumerate(runs):
        if fits(run):
            return LatestRun(run, runs[:number])
    return None


def _has_trained_epoch(run: RunDirectory) -> bool:
    return any(record.trained and record.epoch > 0 for record in run.state.checkpoints)


def _is_abandoned(run: RunDirectory) -> bool:
    return run.state.epochs_done == 0 and (run.state.status == "interrupted" or _was_killed(run))


def _was_killed(run: RunDirectory) -> bool:
    return run.state.status == "running" and not run.is_locked()


def _describe(run: RunDirectory) -> str:
    """``run-20261128-120000 (interrupted after 2 epochs)``."""
    done = run.state.epochs_done
    status = "killed" if _was_killed(run) else run.state.status
    return f"{run.path.name} ({status} after {done} epoch{'' if done == 1 else 's'})"
