"""The records of one run: where every call and trajectory went, the rewards, and what is committed to disk."""

from __future__ import annotations

import copy
import logging
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from nat.data_models.finetuning import TrainingJobStatus

from nat_plugin_evsys.calls import CallTally, DropReason
from nat_plugin_evsys.errors import CheckpointError, ConfigError
from nat_plugin_evsys.finetuning.workflow.policy_rollouts import RolloutReport
from nat_plugin_evsys.policy.recorder import RecorderTotals
from nat_plugin_evsys.report.metrics_log import MetricsLog
from nat_plugin_evsys.report.summary import RunSummary
from nat_plugin_evsys.runs import RunDirectory, RunState, is_service_path, policy_directory
from nat_plugin_evsys.runs.environment import add_environment
from nat_plugin_evsys.training.job_ledger import JobLedger

logger = logging.getLogger(__name__)

Resume = bool | Literal["previous"]
"""The trainer's ``resume`` setting."""


class RunBooks:
    """Counts in memory during an epoch; ``commit`` puts them on disk together with the checkpoint's name.

    Args:
        policy: whose books these are, if the run trains several policies.
    """

    def __init__(self, run_dir: RunDirectory, policy: str | None = None) -> None:
        self.run_dir = run_dir
        self._policy = policy
        self._strays: Counter[DropReason] = Counter()  # those of this process that the tally has
        self.metrics = MetricsLog(run_dir.metrics_path)
        self._started = time.monotonic()
        self._refusals: dict[str, int] = {}  # those of this process; states do not keep them
        self._load_counts()

    @classmethod
    def open(
        cls, output_dir: Path, config: Mapping[str, Any], *, resume: Resume, policy: str | None = None
    ) -> RunBooks:
        """A new run directory, or the newest one to resume.

        Args:
            policy: see the class.

        Raises:
            ConfigError: nothing to resume, the settings changed, or another process runs it.
            CheckpointError: the run's state cannot be read, and ``resume`` is not ``previous``.
        """
        if not resume:
            run_dir = RunDirectory.create(output_dir, config)
            add_environment(run_dir.path)
            return cls(run_dir, policy)
        newest = RunDirectory.newest(output_dir, previous=resume == "previous")
        if newest is None:
            raise ConfigError(f"resume: there is no run under {output_dir}; set resume: false to start one")
        newest.check_config(config)
        newest.lock()
        add_environment(newest.path)
        return cls(newest, policy)

    @classmethod
    def of_policy(cls, own: RunBooks, name: str, config: Mapping[str, Any]) -> RunBooks:
        """Those of a further policy of the run whose own books are open; raises as ``policy_directory``.

        Args:
            config: the run's, with the policy's own trainer adapter and reward.
        """
        run_dir = policy_directory(own.run_dir, name, config)
        add_environment(run_dir.path)
        return cls(run_dir, name)

    @property
    def state(self) -> RunState:
        """What has been committed, plus what the next ``commit`` will add."""
        return self.run_dir.state

    @property
    def has_trained(self) -> bool:
        """Whether anything was trained so far: by an epoch, or by the warm start."""
        return self._tally.trained > 0 or self._trained_trajectories > 0 or self.state.warm_started

    @property
    def any_succeeded(self) -> bool:
        """Whether a rollout of a finished epoch ended without an error."""
        return any(row.get("failed_rollouts", 0) < row.get("rollouts", 0) for row in self.metrics.epochs())

    @property
    def is_finished(self) -> bool:
        """Whether the run has ended as planned, with its summary."""
        return self.state.status == "finished" and self.run_dir.summary_path.is_file()

    def rewind(self) -> None:
        """Remove from the run directory whatever the committed state does not know, and commit that the run goes on."""
        epoch = self.state.committed_epoch
        self.metrics.truncate_after(epoch)
        JobLedger(self.run_dir.path).discard_after(epoch)
        self.run_dir.rollouts.discard_after(epoch)
        self.run_dir.discard_unrecorded()
        self.run_dir.summary_path.unlink(missing_ok=True)
        self.state.status, self.state.error = "running", None
        self.run_dir.save_state()
        self._committed = copy.deepcopy(self.state)

    def undo_finish(self) -> None:
        """Forget the last measurements: the run was stopped before all that its end writes was there."""
        if self.state.status == "finished" and (last := self.run_dir.history.at(self.state.epochs_done)):
            self._go_to(last)

    def fall_back(self) -> bool:
        """Go back to the newest committed state of an earlier epoch; False if there is none. ``rewind`` commits it."""
        older = self.run_dir.history.newest(before=self.state.epochs_done)
        if older is None or older.last_checkpoint() is None:
            return False
        self._go_to(older)
        return True

    def go_to(self, epoch: int) -> None:
        """Go to what was committed after ``epoch`` epochs, or with -1 to the very start. ``rewind`` commits it.

        A run's further policies are committed before the run itself, so they may be an epoch ahead of it.

        Raises:
            CheckpointError: it is no longer there.
        """
        if self.state.committed_epoch != epoch:
            older = RunState() if epoch < 0 else self.run_dir.history.at(epoch)
            if older is None:
                raise CheckpointError(f"{self.run_dir.path} has no state of epoch {epoch}, where the run is")
            self._go_to(older)

    def _go_to(self, state: RunState) -> None:
        self.run_dir.state = state
        self.run_dir.restore_checkpoints()
        self.run_dir.forget_missing()
        self._load_counts()

    # -- counting ---------------------------------------------------------------------------------------------------

    def count_rollouts(self, report: RolloutReport) -> None:
        """Count calls made, and those of rollouts that cannot be trained on."""
        self._tally.add(report.tally)
        self._dropped_trajectories.update(report.lost)

    def count_dropped(self, calls: Mapping[DropReason, int], trajectories: Mapping[DropReason, int]) -> None:
        """Count calls and trajectories held back, under their reasons."""
        self._tally.dropped.update(calls)
        self._dropped_trajectories.update(trajectories)

    def count_job(self, status: TrainingJobStatus) -> None:
        """Count what the training job trained on and dropped, from its final status."""
        metadata = status.metadata or {}
        self._tally.trained += int(metadata["trained"])
        self._tally.dropped.update(metadata["dropped"])
        self._trained_trajectories += int(metadata["trajectories"]["trained"])
        self._dropped_trajectories.update(metadata["trajectories"]["dropped"])

    def count_stray_calls(self, totals: RecorderTotals, others: Iterable[RecorderTotals] = ()) -> None:
        """Count calls that reached the endpoint but belong to no rollout, were refused, or got no answer, as far as
        they are not counted yet.

        Args:
            totals: of this process.
            others: of the policies that are not trained.
        """
        strays = Counter(
            {
                DropReason.UNATTRIBUTED: totals.unattributed,
                DropReason.CALL_FAILED: totals.failures,
                DropReason.CLIENT_DISCONNECTED: totals.disconnected,
                DropReason.NOT_TARGETED: sum(other.answered for other in others),
                **totals.refused,
            }
        )
        self._refusals = dict(totals.refusals)
        for reason, number in (strays - self._strays).items():
            self._tally.calls += number
            self._tally.drop(reason, number)
        self._strays |= strays

    def reward_of_checkpoint(self, epoch: int, reward: float) -> None:
        """Without held-out data the reward of a checkpoint, if it is still there, is that of the rollouts which its
        policy made. The last one has none: what its policy earns when it is measured greedily is another figure.
        """
        record = next((record for record in self.state.checkpoints if record.epoch == epoch), None)
        if record is not None:
            self.run_dir.record_checkpoint(
                record.name,
                record.epoch,
                reward,
                adapter=self.run_dir.locate(record.adapter),
                training_state=None if record.training_state is None else self.run_dir.locate(record.training_state),
                trained=record.trained,
            )

    # -- committing -------------------------------------------------------------------------------------------------

    def commit(
        self,
        epochs_done: int,
        name: str,
        adapter: str,
        training_state: str,
        reward: float | None,
        *,
        curriculum: dict[str, Any],
        keep: int,
    ) -> list[str]:
        """Finish an epoch: its checkpoint and metrics are on disk, and now the state names them.

        Returns:
            Checkpoints on a service that nothing names any more; those on disk have been deleted.
        """
        state = self.state
        state.epochs_done = epochs_done
        state.curriculum = curriculum
        self.run_dir.record_checkpoint(
            name, epochs_done, reward, adapter=adapter, training_state=training_state, trained=self.has_trained
        )
        for missing in self.run_dir.forget_missing():
            logger.warning("checkpoint %s is no longer in %s; the run goes on without it", missing, self.run_dir.path)
        self._save_counts()
        before = self._on_service()
        self.run_dir.prune(keep)
        self._committed = copy.deepcopy(self.state)
        after = self._on_service()
        return [path for path in before if path not in after]

    def stop(
        self, status: Literal["failed", "interrupted"], why: str, trackers: dict[str, dict[str, Any]] | None = None
    ) -> None:
        """Record why the run ended early, with a ``summary.json`` of how far it got.

        What happened since the last commit is dropped from the state: that epoch will run again.
        """
        reason = DropReason.JOB_FAILED if status == "failed" else DropReason.JOB_CANCELED
        self._tally.drop(reason, self._tally.calls - self._tally.trained - self._tally.dropped.total())
        seconds = self._seconds()
        self.run_dir.state = copy.deepcopy(self._committed)
        self.state.status, self.state.error = status, why
        self.run_dir.save_state()
        summary = self._summary(self.state.has_trained, None, trackers or {})
        summary.seconds = round(seconds, 3)
        summary.write(self.run_dir.summary_path)

    def finish(self, serve_command: str, trackers: dict[str, dict[str, Any]]) -> RunSummary:
        """Write ``summary.json``; the run is done. If nothing was trained, it names no adapter.

        Raises:
            CheckpointError: someone has deleted what the run has trained.
        """
        state = self.state
        last = state.last_checkpoint()
        if last is not None and last.name in self.run_dir.forget_missing():
            raise CheckpointError(
                f"the checkpoint of the last epoch, {self.run_dir.locate(last.adapter)}, was deleted while the run "
                f"went on. {self.run_dir.history.how_to_go_back(state.epochs_done)}"
            )
        state.status = "finished"
        self._save_counts()
        self.run_dir.save_state()
        self._committed = copy.deepcopy(state)
        summary = self._summary(self.has_trained, serve_command, trackers)
        summary.write(self.run_dir.summary_path)
        return summary

    def _summary(self, has_adapter: bool, serve_command: str | None, trackers: dict[str, dict[str, Any]]) -> RunSummary:
        return RunSummary.of(
            self.run_dir,
            self.metrics.rows(),
            self._tally,
            trajectories=self._trajectories(),
            refusals=self._refusals,
            policy=self._policy,
            serve_command=serve_command,
            trackers=trackers,
            has_adapter=has_adapter,
        )

    def _on_service(self) -> list[str]:
        places = [place for record in self.state.checkpoints for place in (record.adapter, record.training_state)]
        return [place for place in places if place is not None and is_service_path(place)]

    def _load_counts(self) -> None:
        tally, trajectories = self.state.tally, self.state.trajectories
        self._tally = CallTally(tally["calls"], tally["trained"], _reasons(tally["dropped"], self.run_dir))
        self._trained_trajectories = int(trajectories["trained"])
        self._dropped_trajectories = _reasons(trajectories["dropped"], self.run_dir)
        self._seconds_before = self.state.seconds
        self._committed = copy.deepcopy(self.state)

    def _save_counts(self) -> None:
        tally, state = self._tally, self.state
        state.tally = {"calls": tally.calls, "trained": tally.trained, "dropped": dict(tally.dropped)}
        state.trajectories = self._trajectories()
        state.seconds = self._seconds()

    def _trajectories(self) -> dict[str, Any]:
        return {"trained": self._trained_trajectories, "dropped": dict(self._dropped_trajectories)}

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._started


def _reasons(dropped: Mapping[str, int], run_dir: RunDirectory) -> Counter[DropReason]:
    """The counts in a run's state.

    Raises:
        CheckpointError: another version of this package counted under a reason that this one does not know.
    """
    try:
        return Counter({DropReason(reason): number for reason, number in dropped.items()})
    except ValueError as error:
        raise CheckpointError(f"cannot resume {run_dir.path}: {error}; use the version that wrote it") from None
