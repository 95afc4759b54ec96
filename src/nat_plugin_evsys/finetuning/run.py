"""One session of a run: start or resume it, run the remaining epochs, and finish."""

from __future__ import annotations

import asyncio
import logging
import statistics
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol

from nat.data_models.finetuning import TrainingJobRef, TrainingJobStatus, TrainingStatusEnum

from nat_plugin_evsys.calls import CallFate, DropReason, PromptHistory
from nat_plugin_evsys.errors import EvsysError, JobError, NothingTrainedError, RunLostError
from nat_plugin_evsys.finetuning.advice import how_to_resume, serve_command, why_nothing_was_trained
from nat_plugin_evsys.finetuning.bookkeeping import RunBooks
from nat_plugin_evsys.finetuning.collapse import RATE_FACTOR, RELOADED, collapse_of, rate_after, reload_best, stopped
from nat_plugin_evsys.finetuning.curriculum import Curriculum
from nat_plugin_evsys.finetuning.epoch_checkpoints import EpochCheckpoints
from nat_plugin_evsys.finetuning.garbage import gc_frozen
from nat_plugin_evsys.finetuning.job_queue import BACKEND
from nat_plugin_evsys.finetuning.overlap import hold_next_rollouts, hold_resumed_rollouts
from nat_plugin_evsys.finetuning.rollout_keeper import RolloutKeeper
from nat_plugin_evsys.finetuning.run_inputs import RunInputs
from nat_plugin_evsys.finetuning.run_pages import RunPages
from nat_plugin_evsys.finetuning.scoring import Scoring, ScoringTrainer
from nat_plugin_evsys.finetuning.trajectory_builder import RolloutReport
from nat_plugin_evsys.finetuning.warm_start import warm_start
from nat_plugin_evsys.finetuning.watch import Watch
from nat_plugin_evsys.policy.policy import Policy
from nat_plugin_evsys.report.findings import Finding
from nat_plugin_evsys.report.metrics_log import EPOCH, WARM_START
from nat_plugin_evsys.report.summary import RunSummary, print_at_exit
from nat_plugin_evsys.report.trackers.tracking import Tracking
from nat_plugin_evsys.runs.rollouts import Collection
from nat_plugin_evsys.training.sdft import SdftStep
from nat_plugin_evsys.training.sft import SftStep

if TYPE_CHECKING:
    from nat.data_models.finetuning import FinetuneConfig

    from nat_plugin_evsys.config import EvsysTrainerConfig, WarmStartConfig
    from nat_plugin_evsys.finetuning.trainer_adapter import EvsysTrainerAdapter
    from nat_plugin_evsys.report.display import Display

logger = logging.getLogger(__name__)

_STATUS_INTERVAL = 0.5
"""Seconds between two looks at a running job."""


class SessionTrainer(ScoringTrainer, Protocol):
    """What a session needs from NAT's Trainer."""

    config: EvsysTrainerConfig
    run_config: FinetuneConfig
    trainer_adapter: EvsysTrainerAdapter

    @property
    def held_back(self) -> Mapping[str, DropReason]:
        """Why each rollout that the curriculum held back in the last epoch was, by rollout id."""

    @property
    def last_report(self) -> RolloutReport:
        """The result of the last epoch's rollouts."""

    async def start_epoch(self, epoch: int, run_id: str) -> TrainingJobRef | None:
        """Roll out and submit one training job; None when no trajectory is left to train on."""

    def log_progress(self, epoch: int, metrics: dict[str, Any]) -> None:
        """Record an epoch's row of metrics."""


class RunSession:
    """One process's part of a run. Epochs count from 0 here and from 1 in anything shown."""

    def __init__(
        self,
        trainer: SessionTrainer,
        books: RunBooks,
        inputs: RunInputs,
        curriculum: Curriculum,
        display: Display,
        tracking: Tracking,
    ) -> None:
        self._trainer = trainer
        self._policy = trainer.trajectory_builder.policy
        self._books = books
        self._inputs = inputs
        self._curriculum = curriculum
        self._display = display
        self._tracking = tracking
        self._pages = RunPages(books.run_dir, books.metrics)
        self._watch = Watch(books.metrics)
        self._checkpoints = EpochCheckpoints(self._policy, books, trainer.config.keep_checkpoints)
        self._keeper = RolloutKeeper(
            books.run_dir.rollouts,
            lambda token_id: self._policy.renderer.token_bytes(token_id),
            rows=trainer.config.keep_rollouts,
            session=books.run_dir.path.name,
            agent=inputs.workflow,
            model=inputs.policy.base_model,
        )
        self._scoring = Scoring(trainer, books, inputs, self._keeper, display, tracking)

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
        try:
            await self._begin_or_reload(num_epochs)
            first = self._books.state.epochs_done
            with gc_frozen():
                for epoch in range(first, num_epochs):
                    collapse = await self._epoch(epoch, num_epochs)
                    if collapse is not None and self._trainer.config.on_collapse == "stop":
                        await self._finish()
                        raise stopped(collapse, self._books.state)
                summary = await self._finish()
        except asyncio.CancelledError:
            self._stop("interrupted", self._how_to_resume())
            logger.warning("interrupted. %s", self._how_to_resume())
            raise
        except Exception as error:
            self._stop("failed", f"{error}")
            raise
        return [self._outcome(summary)]

    async def _begin_or_reload(self, num_epochs: int) -> None:
        books = self._books
        books.rewind()
        if books.state.last_checkpoint() is None:
            await self._begin()
            return
        source = await self._checkpoints.reload(previous=self._trainer.config.resume == "previous")
        if self._trainer.config.overlap_rollouts:
            await hold_resumed_rollouts(self._policy, books.run_dir)
        self._curriculum.load_state(books.state.curriculum)
        rows = books.metrics.rows()
        self._trainer.trainer_adapter.scale_rate(rate_after(rows))
        trained = [row["job"] for row in rows if row["event"] == EPOCH and (row.get("job") or {}).get("steps")]
        if trained:
            self._trainer.trainer_adapter.resume_after(trained[-1])
        self._display.phase("resume", f"after epoch {books.state.epochs_done} of {num_epochs}, from {source}")

    async def _already_finished(self) -> RunSummary:
        """The summary of a run that has no epoch left to do; nothing is evaluated or counted again."""
        path = self._books.run_dir.summary_path
        logger.warning(
            "the run has finished all of its %d epochs; raise finetuning.num_epochs to continue",
            self._books.state.epochs_done,
        )
        summary = RunSummary.read(path)
        await asyncio.to_thread(self._tracking.close, "finished")
        print_at_exit(summary.format(path))
        return summary

    async def _begin(self) -> None:
        state, config = self._books.state, self._trainer.config.warm_start
        if config is not None:
            await self._scoring.base()
            await self._warm_start(config)
        state.train_reward_before = await self._scoring.training_rows(0)
        state.heldout_reward_before = await self._scoring.heldout(0)
        await self._checkpoints.save(0, state.heldout_reward_before, {})

    async def _warm_start(self, config: WarmStartConfig) -> None:
        self._display.phase("warm start", str(config.demonstrations))
        started = time.monotonic()
        metrics = await warm_start(self._policy, config, self._show_warm_start)
        metrics["seconds"] = round(time.monotonic() - started, 3)
        self._books.metrics.append(WARM_START, 0, **metrics)
        self._tracking.warm_start(metrics)
        self._books.state.warm_started = True

    async def _epoch(self, epoch: int, num_epochs: int) -> Finding | None:
        """Run one epoch, from rollouts to checkpoint. Returns the finding of a collapse, if there is one."""
        self._books.run_dir.check_present()
        started = time.monotonic()
        run_id = self._books.run_dir.path.name
        ref = await self._roll_out(epoch, run_id)
        report = self._trainer.last_report
        attempts, held_back = self._trainer.trajectory_builder.take_attempts(), self._trainer.held_back
        self._policy.release_rollouts()
        if self._trainer.config.overlap_rollouts and epoch + 1 < num_epochs:
            hold_next_rollouts(self._policy)
            await self._trainer.trajectory_builder.start_run(run_id, {"epoch": epoch + 1})
        rolled_out = time.monotonic()
        try:
            status = None if ref is None else await self._wait(ref)
        finally:
            fates = {} if ref is None else self._trainer.trainer_adapter.take_fates(ref)
            fates |= {key: CallFate(reason) for key, reason in report.left_out.items()}
            await self._keeper.keep(Collection("epoch", epoch + 1), attempts, fates=fates, held_back=held_back)
        if status is not None:
            self._books.count_job(status)
        row = {
            **_row(report, status, rolled_out - started, time.monotonic() - rolled_out),
            "policy_version": self._policy.version,
            "curriculum_percentile": self._curriculum.percentile(epoch),
        }
        if self._inputs.validation_dataset is None:
            self._books.reward_of_last_checkpoint(row["reward_mean"])
        validated = self._inputs.is_validation_due(epoch + 1, num_epochs)
        heldout = await self._scoring.heldout(epoch + 1) if validated else None
        columns, found = self._watch.look(
            epoch + 1, report, row["job"], self._trainer.last_evaluation if validated else None
        )
        row |= columns
        collapse = collapse_of(row)
        best = None
        if collapse is not None and self._trainer.config.on_collapse == "reload_best":
            best = await reload_best(self._checkpoints, self._books.state)
            row |= {} if best is None else {RELOADED: best.name}
        self._trainer.log_progress(epoch + 1, row)
        self._tracking.epoch(epoch + 1, row)
        await self._checkpoints.save(epoch + 1, heldout if best is None else best.reward, self._curriculum.state())
        self._display.epoch_done(epoch + 1, num_epochs, row)
        for finding in found:
            self._display.finding(finding)
        if best is not None:
            self._trainer.trainer_adapter.scale_rate(rate_after(self._books.metrics.rows()))
            self._display.phase("reload", f"{best.name}, continuing at {RATE_FACTOR:g} times the learning rate")
        self._pages.after_epoch()
        return collapse

    async def _roll_out(self, epoch: int, run_id: str) -> TrainingJobRef | None:
        """Roll out and submit a job; if that fails, the rollouts are kept nonetheless."""
        try:
            return await self._trainer.start_epoch(epoch, run_id)
        except EvsysError:
            await self._scoring.keep(Collection("epoch", epoch + 1))
            raise

    async def _wait(self, ref: TrainingJobRef) -> TrainingJobStatus:
        """Wait for the job and show its progress.

        Raises:
            JobError: it did not complete.
        """
        adapter = self._trainer.trainer_adapter
        done = asyncio.ensure_future(adapter.wait_until_complete(ref, poll_interval=60.0))
        steps_before = self._policy.version
        tracked = 0
        try:
            while not (await asyncio.wait({done}, timeout=_STATUS_INTERVAL))[0]:
                self._display.job(await adapter.status(ref))
                tracked = self._track_steps(ref, steps_before, tracked)
        finally:
            done.cancel()
            self._track_steps(ref, steps_before, tracked)
        status = done.result()
        self._display.job(status)
        if status.status != TrainingStatusEnum.COMPLETED:
            raise JobError(f"training job {status.status.value}: {status.message}. {self._how_to_resume()}")
        return status

    def _track_steps(self, ref: TrainingJobRef, steps_before: int, tracked: int) -> int:
        """Tell the trackers of the steps after the first ``tracked`` ones; returns how many they know now."""
        by_step = self._trainer.trainer_adapter.metrics_by_step(ref)
        for number, metrics in enumerate(by_step[tracked:], start=steps_before + tracked + 1):
            self._tracking.step(number, metrics)
        return len(by_step)

    async def _finish(self) -> RunSummary:
        """Measure the last policy, write the summary, and print it when the process ends.

        Raises:
            NothingTrainedError: nothing was trained, neither by an epoch nor by a warm start.
        """
        books = self._books
        reward = await self._scoring.training_rows(books.state.epochs_done)
        books.state.train_reward_after = reward
        if self._inputs.validation_dataset is None and reward is not None:
            books.reward_of_last_checkpoint(reward)
        others = [policy.recorder.totals for policy in Policy.all() if policy is not self._policy]
        books.count_stray_calls(self._policy.recorder.totals, others)
        await asyncio.to_thread(self._tracking.close, "finished" if books.has_trained else "failed")
        adapter = self._trainer.trainer_adapter.config
        summary = books.finish(
            serve_command=serve_command(adapter.policy, self._policy.config.checkpoint),
            trackers=self._tracking.counts(),
        )
        self._pages.write()
        print_at_exit(summary.format(books.run_dir.summary_path))
        if not books.has_trained:
            raise NothingTrainedError(why_nothing_was_trained(summary))
        return summary

    def _outcome(self, summary: RunSummary) -> TrainingJobStatus:
        return TrainingJobStatus(
            run_id=self._books.run_dir.path.name,
            backend=BACKEND,
            status=TrainingStatusEnum.COMPLETED,
            progress=100.0,
            message=f"epochs: {summary.epochs}, calls: {summary.calls}, of which trained on: {summary.trained}",
        )

    def _stop(self, status: Literal["failed", "interrupted"], why: str) -> None:
        try:
            self._books.stop(status, why)
        except (RunLostError, OSError) as error:  # what stopped the run is the error to show
            logger.warning("the run directory does not say that the run %s: %s", status, error)
            return
        self._pages.write()

    def _show_warm_start(self, step: SftStep | SdftStep) -> None:
        self._display.steps(step.step, step.total_steps, f"loss per token {step.loss:.3f}")

    def _how_to_resume(self) -> str:
        return how_to_resume(self._trainer.run_config.trainer)


def _row(
    report: RolloutReport, status: TrainingJobStatus | None, rollout_seconds: float, training_seconds: float
) -> dict[str, Any]:
    """An epoch's row of metrics.jsonl."""
    rewards = report.rewards
    job = dict(status.metadata or {}) if status is not None else {}
    return {
        "reward_mean": report.mean_reward,
        "reward_min": min(rewards),
        "reward_max": max(rewards),
        "reward_std": statistics.pstdev(rewards),
        "rollouts": len(report.replies),
        "failed_rollouts": report.failed_rollouts,
        "extra_rollouts": report.extra_rollouts,
        "errors": report.errors,
        "calls": report.tally.calls,
        "malformed_calls": report.malformed_calls,
        "prompts": {each.value: report.prompts[each] for each in PromptHistory},
        "staleness": {str(age): count for age, count in sorted(report.staleness.items())},
        **({} if report.drift is None else {"drift": report.drift}),
        "trained": job.get("trained", 0),
        "loss": job.get("loss"),
        "seconds": round(rollout_seconds + training_seconds, 3),
        "rollout_seconds": round(rollout_seconds, 3),
        "training_seconds": round(training_seconds, 3),
        "job": job,
    }
