"""One session of a run: start or resume it, run the remaining epochs, and finish."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

from nat.data_models.finetuning import TrainingJobRef, TrainingJobStatus, TrainingStatusEnum

from nat_plugin_evsys.errors import EvsysError, JobError, NothingTrainedError, RunLostError
from nat_plugin_evsys.finetuning.advice import how_to_resume, serve_command, why_nothing_was_trained
from nat_plugin_evsys.finetuning.collapse import RATE_FACTOR, collapse_of, rate_after, stopped
from nat_plugin_evsys.finetuning.epoch_checkpoints import reload
from nat_plugin_evsys.finetuning.job_queue import BACKEND
from nat_plugin_evsys.finetuning.learner import Learner
from nat_plugin_evsys.finetuning.overlap import hold_next_rollouts, hold_resumed_rollouts
from nat_plugin_evsys.finetuning.run_inputs import RunInputs
from nat_plugin_evsys.finetuning.scoring import Scoring, ScoringTrainer
from nat_plugin_evsys.finetuning.warm_start import warm_start
from nat_plugin_evsys.garbage import gc_frozen
from nat_plugin_evsys.policy.policy import Policy
from nat_plugin_evsys.report.findings import Finding
from nat_plugin_evsys.report.metrics_log import EPOCH, WARM_START
from nat_plugin_evsys.report.summary import RunSummary, print_at_exit
from nat_plugin_evsys.runs.rollouts import Collection
from nat_plugin_evsys.runs.state import CheckpointRecord
from nat_plugin_evsys.training.sdft import SdftStep
from nat_plugin_evsys.training.sft import SftStep

if TYPE_CHECKING:
    from nat.data_models.finetuning import FinetuneConfig

    from nat_plugin_evsys.config import EvsysTrainerConfig, WarmStartConfig
    from nat_plugin_evsys.finetuning.trajectory_builder import EvsysTrajectoryBuilder
    from nat_plugin_evsys.report.display import Display

logger = logging.getLogger(__name__)

_STATUS_INTERVAL = 0.5
"""Seconds between two looks at a running job."""


class SessionTrainer(ScoringTrainer, Protocol):
    """What a session needs from NAT's Trainer."""

    config: EvsysTrainerConfig
    run_config: FinetuneConfig
    trajectory_builder: EvsysTrajectoryBuilder

    async def start_epoch(self, epoch: int, run_id: str) -> TrainingJobRef | None:
        """Roll out and submit the first policy's job; None when no trajectory is left to train on."""

    def log_progress(self, epoch: int, metrics: dict[str, Any]) -> None:
        """Record an epoch's row of metrics of the first policy."""


@dataclasses.dataclass(frozen=True, slots=True)
class _EpochEnd:
    """What an epoch came to for one policy.

    Attributes:
        row: of metrics.jsonl.
        reward: of the checkpoint that is about to be saved; None if it was not measured.
        findings: the new ones.
        reloaded: the checkpoint that was loaded since the policy has collapsed, or None.
    """

    learner: Learner
    row: dict[str, Any]
    reward: float | None
    findings: list[Finding]
    reloaded: CheckpointRecord | None


class RunSession:
    """One process's part of a run. Epochs count from 0 here and from 1 in anything shown.

    Args:
        learners: one for each policy under training. NAT's hooks are about the first, whose state commits the run.
    """

    def __init__(
        self, trainer: SessionTrainer, learners: Sequence[Learner], inputs: RunInputs, display: Display
    ) -> None:
        self._trainer = trainer
        self._learners = learners
        self._own = learners[0]
        self._books = self._own.books
        self._inputs = inputs
        self._display = display
        self._scoring = Scoring(trainer, learners, inputs, display)

    async def run(self, num_epochs: int) -> list[TrainingJobStatus]:
        """Run (or resume) all epochs.

        Returns:
            One status for the whole run; its message is the result.

        Raises:
            JobError: a training job failed or was canceled; the run can be resumed from the epoch before.
            NothingTrainedError: the run ended without training anything.
            CollapseError: the policy has collapsed, and ``on_collapse`` is ``stop``.
        """
        if self._books.is_finished and self._books.state.epochs_done >= num_epochs:
            return [self._outcome(await self._already_finished())]
        resumed = await self._reload(num_epochs)  # what cannot be loaded leaves the run as it is
        try:
            if not resumed:
                await self._begin()
            first = self._books.state.epochs_done
            with gc_frozen():
                for epoch in range(first, num_epochs):
                    collapsed = await self._epoch(epoch, num_epochs)
                    if collapsed is not None and self._trainer.config.on_collapse == "stop":
                        learner, finding = collapsed
                        await self._finish(stopped(finding, learner.books.state))
                summary = await self._finish()
        except asyncio.CancelledError:
            self._stop("interrupted", self._how_to_resume())
            logger.warning("interrupted. %s", self._how_to_resume())
            raise
        except Exception as error:
            self._stop("failed", f"{error}")
            raise
        return [self._outcome(summary)]

    async def _reload(self, num_epochs: int) -> bool:
        """Load what the run has committed; False if that is nothing."""
        books = self._books
        if not books.is_finished:
            for learner in self._learners:
                learner.books.undo_finish()
        if books.state.last_checkpoint() is None:
            for learner in self._learners:
                learner.books.go_to(books.state.committed_epoch)
                learner.books.rewind()
            return False
        checkpoints = [learner.checkpoints for learner in self._learners]
        source = await reload(checkpoints, previous=self._trainer.config.resume == "previous")
        for learner in self._learners:
            if self._trainer.config.overlap_rollouts:
                await hold_resumed_rollouts(learner.policy, learner.books.run_dir)
            learner.resume()
        self._trainer.trajectory_builder.any_succeeded = books.any_succeeded
        self._display.phase("resume", f"after epoch {books.state.epochs_done} of {num_epochs}, from {source}")
        return True

    async def _already_finished(self) -> RunSummary:
        """The summary of a run that has no epoch left to do; nothing is evaluated or counted again."""
        path = self._books.run_dir.summary_path
        logger.warning(
            "the run has finished all of its %d epochs; raise finetuning.num_epochs to continue",
            self._books.state.epochs_done,
        )
        summary = RunSummary.read(path)
        await asyncio.to_thread(self._own.tracking.close, "finished")
        print_at_exit(summary.format(path))
        return summary

    async def _begin(self) -> None:
        config = self._trainer.config.warm_start
        if config is not None:
            await self._scoring.base()
            await self._warm_start(config)
        for learner, reward in zip(self._learners, await self._scoring.training_rows(0), strict=True):
            learner.books.state.train_reward_before = reward
        rewards = await self._scoring.heldout(0)
        for learner, reward in zip(self._learners, rewards, strict=True):
            learner.books.state.heldout_reward_before = reward
        await self._commit(0, rewards)

    async def _commit(self, epochs_done: int, rewards: Sequence[float | None]) -> None:
        """Save every policy; the first one last, since its state commits the run."""
        self._count_stray_calls()
        for learner, reward in reversed(list(zip(self._learners, rewards, strict=True))):
            curriculum = learner.curriculum.state() if epochs_done else {}
            await learner.checkpoints.save(epochs_done, reward, curriculum)

    async def _warm_start(self, config: WarmStartConfig) -> None:
        self._display.phase("warm start", str(config.demonstrations))
        started = time.monotonic()
        metrics = await warm_start(self._own.policy, config, self._show_warm_start)
        metrics["seconds"] = round(time.monotonic() - started, 3)
        self._books.metrics.append(WARM_START, 0, **metrics)
        self._own.tracking.warm_start(metrics)
        self._books.state.warm_started = True

    async def _epoch(self, epoch: int, num_epochs: int) -> tuple[Learner, Finding] | None:
        """Run one epoch, from rollouts to checkpoint. Returns who has collapsed, with the finding, or None."""
        self._books.run_dir.check_present()
        started = time.monotonic()
        run_id = self._books.run_dir.path.name
        ref = await self._roll_out(epoch, run_id)
        for learner in self._learners:
            learner.policy.release_rollouts()
        if self._trainer.config.overlap_rollouts and epoch + 1 < num_epochs:
            for learner in self._learners:
                hold_next_rollouts(learner.policy)
            await self._trainer.trajectory_builder.start_run(run_id, {"epoch": epoch + 1})
        rolled_out = time.monotonic() - started
        rows = [await self._train(learner, ref, epoch, rolled_out) for learner in self._learners]
        if self._inputs.validation_dataset is None and self._trainer.trajectory_builder.samples:
            sampled_by = max(epoch - 1, 0) if self._trainer.config.overlap_rollouts else epoch
            for learner, row in zip(self._learners, rows, strict=True):
                if learner.report.epochs_per_pass == 1:  # else each epoch has other rows
                    learner.books.reward_of_checkpoint(sampled_by, row["reward_mean"])
        rewards: list[float | None] = [None for _ in self._learners]
        if validated := self._inputs.is_validation_due(epoch + 1, num_epochs):
            rewards = await self._scoring.heldout(epoch + 1)
        ends = [
            await self._end_epoch(learner, epoch, row, reward, validated=validated)
            for learner, row, reward in zip(self._learners, rows, rewards, strict=True)
        ]
        await self._commit(epoch + 1, [end.reward for end in ends])
        for end in ends:
            self._show_epoch(end, epoch + 1, num_epochs)
        collapses = ((end.learner, collapse_of(end.row)) for end in ends)
        return next(((each, self._named(each, found)) for each, found in collapses if found is not None), None)

    async def _end_epoch(
        self, learner: Learner, epoch: int, row: dict[str, Any], reward: float | None, *, validated: bool
    ) -> _EpochEnd:
        """Look at a policy's epoch, reload its best checkpoint if that is asked for, and log the row."""
        findings = learner.look(epoch, row, validated=validated)
        reloaded = None
        if self._trainer.config.on_collapse == "reload_best":
            reloaded = await learner.reload_if_collapsed(row, reward)
        self._log(learner, epoch, row)
        if reloaded is not None:
            learner.adapter.scale_rate(rate_after(learner.books.metrics.rows()))
        return _EpochEnd(learner, row, reward if reloaded is None else reloaded.reward, findings, reloaded)

    def _show_epoch(self, end: _EpochEnd, epochs_done: int, num_epochs: int) -> None:
        learner = end.learner
        self._display.epoch_done(epochs_done, num_epochs, end.row)
        for finding in end.findings:
            self._display.finding(self._named(learner, finding))
        if end.reloaded is not None:
            self._display.phase("reload", f"{end.reloaded.name}, continuing at {RATE_FACTOR:g} times the learning rate")
        learner.pages.after_epoch()

    def _log(self, learner: Learner, epoch: int, row: dict[str, Any]) -> None:
        if learner is self._own:
            self._trainer.log_progress(epoch + 1, row)
        else:
            learner.books.metrics.append(EPOCH, epoch + 1, **row)
        learner.tracking.epoch(epoch + 1, row)

    async def _roll_out(self, epoch: int, run_id: str) -> TrainingJobRef | None:
        """Roll out and submit the first job; if that fails, the rollouts are kept nonetheless."""
        try:
            return await self._trainer.start_epoch(epoch, run_id)
        except EvsysError:
            await self._scoring.keep(Collection("epoch", epoch + 1))
            raise

    async def _train(
        self, learner: Learner, own_ref: TrainingJobRef | None, epoch: int, rollout_seconds: float
    ) -> dict[str, Any]:
        """Train a policy on the epoch's rollouts and keep these; returns its row of metrics.jsonl so far.

        Policies are trained one after another: each job may use the memory that is free.
        """
        started = time.monotonic()
        ref = own_ref
        if learner is not self._own:
            self._display.phase("training", f"epoch {epoch + 1}, {learner.name}")
            ref = await learner.submit(self._books.run_dir.path.name, epoch)
        try:
            status = None if ref is None else await self._wait(learner, ref)
        finally:
            await learner.keep_epoch(epoch, ref)
        row = learner.row(epoch, status, rollout_seconds, time.monotonic() - started)
        return row if len(self._learners) == 1 else {"policy": learner.name, **row}

    async def _wait(self, learner: Learner, ref: TrainingJobRef) -> TrainingJobStatus:
        """Wait for the job and show its progress.

        Raises:
            JobError: it did not complete.
        """
        adapter = learner.adapter
        done = asyncio.ensure_future(adapter.wait_until_complete(ref, poll_interval=60.0))
        steps_before = learner.steps_taken
        tracked = 0
        try:
            while not (await asyncio.wait({done}, timeout=_STATUS_INTERVAL))[0]:
                self._display.job(await adapter.status(ref))
                tracked = self._track_steps(learner, ref, steps_before, tracked)
        finally:
            done.cancel()
            self._track_steps(learner, ref, steps_before, tracked)
        status = done.result()
        self._display.job(status)
        if status.status != TrainingStatusEnum.COMPLETED:
            raise JobError(f"training job {status.status.value}: {status.message}. {self._how_to_resume()}")
        return status

    @staticmethod
    def _track_steps(learner: Learner, ref: TrainingJobRef, steps_before: int, tracked: int) -> int:
        """Tell the trackers of the steps after the first ``tracked`` ones; returns how many they know now."""
        by_step = learner.adapter.metrics_by_step(ref)
        for number, metrics in enumerate(by_step[tracked:], start=steps_before + tracked + 1):
            learner.tracking.step(number, metrics)
        return len(by_step)

    async def _finish(self, error: EvsysError | None = None) -> RunSummary:
        """Measure the last policies, write the summaries, and print them when the process ends.

        Args:
            error: what ends the run, if that is not its last epoch; it is raised.

        Returns:
            The first policy's.

        Raises:
            NothingTrainedError: a policy was not trained, neither by an epoch nor by a warm start.
        """
        await self._measure_last()
        untrained = next((learner for learner in self._learners if not learner.books.has_trained), None)
        failed = untrained is not None or error is not None
        await asyncio.to_thread(self._own.tracking.close, "failed" if failed else "finished")
        command = serve_command({learner.name: learner.policy.config.checkpoint for learner in self._learners})
        trackers = self._own.tracking.counts()
        several = len(self._learners) > 1
        for learner in self._learners:
            if notice := learner.adapter.warmup_notice():
                self._display.notice(f"{learner.name}: {notice}" if several else notice)
        summaries = {}
        for learner in reversed(self._learners):
            summaries[learner] = learner.books.finish(command, trackers if learner is self._own else {})
            learner.pages.write()
        if untrained is not None:
            name = f"{untrained.name}: " if several else ""
            error = NothingTrainedError(f"{name}{why_nothing_was_trained(summaries[untrained])}")
        texts = []
        for learner, summary in summaries.items():
            if error is not None:
                summary = dataclasses.replace(summary, status="failed", error=str(error), serve_command=None)
            texts.append(summary.format(learner.books.run_dir.summary_path))
        print_at_exit("\n\n".join(texts))
        if error is not None:
            raise error
        return summaries[self._own]

    async def _measure_last(self) -> None:
        """Rewards of what the run ends with, as far as the last epoch has not measured them."""
        epochs_done = self._books.state.epochs_done
        last = self._books.state.last_checkpoint()
        if self._inputs.validation_dataset is not None and last is not None and last.reward is None:
            for learner, reward in zip(self._learners, await self._scoring.heldout(epochs_done), strict=True):
                if reward is not None:
                    learner.books.reward_of_checkpoint(epochs_done, reward)
        for learner, reward in zip(self._learners, await self._scoring.training_rows(epochs_done), strict=True):
            learner.books.state.train_reward_after = reward
        self._count_stray_calls()

    def _count_stray_calls(self) -> None:
        trained = [learner.policy for learner in self._learners]
        others = [policy.recorder.totals for policy in Policy.all() if policy not in trained]
        for learner in self._learners:
            totals = learner.policy.recorder.totals
            learner.books.count_stray_calls(totals, others if learner is self._own else ())

    def _named(self, learner: Learner, finding: Finding) -> Finding:
        """The finding, which says whose it is if there are several policies."""
        if len(self._learners) == 1:
            return finding
        return dataclasses.replace(finding, sentence=f"{learner.name}: {finding.sentence}")

    def _outcome(self, summary: RunSummary) -> TrainingJobStatus:
        return TrainingJobStatus(
            run_id=self._books.run_dir.path.name,
            backend=BACKEND,
            status=TrainingStatusEnum.COMPLETED,
            progress=100.0,
            message=f"epochs: {summary.epochs}, calls: {summary.calls}, of which trained on: {summary.trained}",
        )

    def _stop(self, status: Literal["failed", "interrupted"], why: str) -> None:
        self._count_stray_calls()
        trackers = self._own.tracking.counts()
        for learner in reversed(self._learners):
            try:
                learner.books.stop(status, why, trackers if learner is self._own else None)
            except (RunLostError, OSError) as error:  # what stopped the run is the error to show
                logger.warning("the run directory does not say that the run %s: %s", status, error)
                return
            learner.pages.write_in_time()

    def _show_warm_start(self, step: SftStep | SdftStep) -> None:
        self._display.steps(step.step, step.total_steps, f"loss per token {step.loss:.3f}")

    def _how_to_resume(self) -> str:
        return how_to_resume(self._trainer.run_config.trainer, self._books.state.epochs_done)
