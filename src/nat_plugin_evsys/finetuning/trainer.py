"""NAT's Trainer: rollouts and training epoch by epoch, with validation, checkpoints, resume and the reports."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nat.builder.builder import Builder
from nat.data_models.config import Config
from nat.data_models.dataset_handler import EvalDatasetBaseConfig
from nat.data_models.finetuning import FinetuneConfig, TrainingJobRef, TrainingJobStatus, TrajectoryCollection
from nat.finetuning.interfaces.finetuning_runner import Trainer

from nat_plugin_evsys.config import EvsysTrainerConfig
from nat_plugin_evsys.errors import ConfigError, JobError, RolloutsFailedError
from nat_plugin_evsys.finetuning.bookkeeping import RunBooks
from nat_plugin_evsys.finetuning.checks.batch_check import failure_notices
from nat_plugin_evsys.finetuning.curriculum import Curriculum
from nat_plugin_evsys.finetuning.learner import Learner
from nat_plugin_evsys.finetuning.readable import readable_failures
from nat_plugin_evsys.finetuning.run import RunSession
from nat_plugin_evsys.finetuning.run_inputs import RunInputs
from nat_plugin_evsys.finetuning.signals import signals_cancel
from nat_plugin_evsys.finetuning.telemetry import run_logging
from nat_plugin_evsys.finetuning.traces.builder import EvsysTraceBuilder
from nat_plugin_evsys.finetuning.trainer_adapter import EvsysTrainerAdapter
from nat_plugin_evsys.finetuning.trajectory_builder import EvsysTrajectoryBuilder
from nat_plugin_evsys.finetuning.workflow.policy_rollouts import RolloutReport
from nat_plugin_evsys.policy.policy import Policy
from nat_plugin_evsys.report.displays import create_display
from nat_plugin_evsys.report.metrics_log import EPOCH, MetricsLog
from nat_plugin_evsys.report.trackers.base import TrackedRun, Tracker
from nat_plugin_evsys.report.trackers.create import create_tracker
from nat_plugin_evsys.report.trackers.tracking import Tracking
from nat_plugin_evsys.runs import redact

logger = logging.getLogger(__name__)


async def more_adapters(config: EvsysTrainerConfig, builder: Builder) -> list[EvsysTrainerAdapter]:
    """The trainer adapters of ``also_train``.

    Raises:
        ConfigError: one is of another type.
    """
    found = []
    for name in config.also_train:
        adapter = await builder.get_trainer_adapter(name)
        if not isinstance(adapter, EvsysTrainerAdapter):
            raise ConfigError(f"also_train names `{name}`, which is not an evsys_trainer_adapter; name one")
        found.append(adapter)
    return found


class EvsysTrainer(Trainer):
    """NAT's Trainer for the evsys builder and adapter. Epochs count from 0 here and from 1 in anything shown.

    Args:
        more_adapters: those of ``also_train``, in its order.
    """

    trajectory_builder: EvsysTrajectoryBuilder
    trainer_adapter: EvsysTrainerAdapter

    def __init__(self, trainer_config: EvsysTrainerConfig, more_adapters: Sequence[EvsysTrainerAdapter] = ()) -> None:
        super().__init__(trainer_config)
        self.config = trainer_config
        self._more_adapters = more_adapters
        self._display = create_display(trainer_config.progress)
        self._trackers: dict[str, Tracker] = {}
        self._tracking: Tracking | None = None
        self._learners: list[Learner] = []
        self._curriculum: Curriculum | None = None
        self._inputs: RunInputs | None = None

    async def initialize(self, run_config: FinetuneConfig) -> None:
        """Check everything, then load the model.

        Raises:
            ConfigError, DataError, ModelError: one line that says what to change.
        """
        with readable_failures():
            await self._initialize(run_config)

    async def _initialize(self, run_config: FinetuneConfig) -> None:
        if not isinstance(self.trajectory_builder, EvsysTrajectoryBuilder):
            raise ConfigError("finetuning.trajectory_builder must be an evsys_trajectory_builder for the evsys trainer")
        if not isinstance(self.trainer_adapter, EvsysTrainerAdapter):
            raise ConfigError("finetuning.trainer_adapter must be an evsys_trainer_adapter for the evsys trainer")
        self.run_config = run_config
        self._curriculum = Curriculum(run_config.curriculum_learning, self.config.seed)
        self._inputs = RunInputs.check(run_config, self.config)
        self._trackers = {name: create_tracker(name) for name in self.config.trackers}
        for trained in self._inputs.policies:
            Policy.of(trained.policy).begin_training(resuming=bool(self.config.resume))
        await super().initialize(run_config)
        for adapter in self._more_adapters:
            await adapter.initialize(run_config)
        self.trajectory_builder.on_rollout = self._display.rollouts
        if self.config.overlap_rollouts:
            for adapter in self._adapters:
                adapter.expect_stale_calls("overlap_rollouts")
        if isinstance(self.trajectory_builder, EvsysTraceBuilder):
            self.trajectory_builder.prepare(self.trainer_adapter)

    async def run(self, num_epochs: int) -> list[TrainingJobStatus]:
        """Run (or resume) all epochs.

        Returns:
            One status for the whole run, since NAT prints a line per status.

        Raises:
            JobError: a training job failed or was canceled; the run can be resumed from the epoch before.
            NothingTrainedError: the run ended without training anything.
        """
        async with run_logging(self._require_inputs.general):
            with self._display, signals_cancel(), readable_failures():
                self._open()
                session = RunSession(self, self._learners, self._require_inputs, self._display)
                return await session.run(num_epochs)

    async def run_epoch(self, epoch: int, run_id: str) -> TrainingJobRef:
        """NAT's form of ``start_epoch``: it always has a job to return.

        Raises:
            JobError: no trajectory is left to train on.
        """
        ref = await self.start_epoch(epoch, run_id)
        if ref is None:
            raise JobError(f"epoch {epoch + 1}: no trajectory is left to train on, so no training job was started")
        return ref

    async def start_epoch(self, epoch: int, run_id: str) -> TrainingJobRef | None:
        """Roll out, apply the curriculum and submit one training job; None when no trajectory is left to train on.

        The job is that of ``trainer_adapter``; the rollouts of all policies are counted.
        """
        self._display.phase("rollouts", f"epoch {epoch + 1}")
        if not self.trajectory_builder.is_started(run_id):
            await self.trajectory_builder.start_run(run_id, {"epoch": epoch})
        try:
            collection = await self.trajectory_builder.finalize(run_id, {"epoch": epoch})
        except RolloutsFailedError:
            self._count([learner.rollouts.report for learner in self._learners])
            for learner in self._learners:
                learner.drop_groups()
            raise
        self._count([learner.rollouts.report for learner in self._learners])
        self._tell_failures(self.last_report)
        if extra := self.last_report.extra_rollouts:
            self._display.notice(f"{extra} more rollouts, since all attempts at a row had the same reward")
        if errors := self.last_report.extra_errors:
            self._display.notice(f"WARNING: {len(errors)} of these {extra} failed; the first one: {errors[0]}")
        collection = self.apply_curriculum_learning(collection, epoch)
        if not collection.trajectories:
            logger.warning("epoch %d: no trajectory is left to train on; the policy is unchanged", epoch + 1)
            return None
        several = f", {self._own.name}" if len(self._learners) > 1 else ""
        self._display.phase("training", f"epoch {epoch + 1}{several}")
        return await self.trainer_adapter.submit(collection, epoch=epoch)

    def apply_curriculum_learning(
        self, trajectory_collection: TrajectoryCollection, epoch: int
    ) -> TrajectoryCollection:
        """Drop what the curriculum holds back in this epoch and count it under the curriculum's reasons."""
        return self._own.select(trajectory_collection, epoch)

    def get_curriculum_state(self) -> dict[str, Any]:
        """NAT's keys: current_percentile, last_expansion_epoch, total_groups, included_groups, config."""
        return self._require_curriculum.state()

    async def run_validation_evaluation(self, epoch: int, run_id: str) -> dict[str, Any]:
        """Score the current policy on the held-out dataset. Unlike NAT's, an error is raised, not a reward of 0.

        Returns:
            avg_reward, min_reward, max_reward, num_examples, epoch, dataset_type.
        """
        inputs = self._require_inputs
        report = await self.evaluate("heldout", inputs.validation_dataset, inputs.validation_config)
        return {
            "avg_reward": report.mean_reward,
            "min_reward": min(report.rewards),
            "max_reward": max(report.rewards),
            "num_examples": len(report.rewards),
            "epoch": epoch,
            "dataset_type": "validation",
        }

    async def evaluate(
        self, name: str, dataset: EvalDatasetBaseConfig | None = None, config: Config | None = None
    ) -> RolloutReport:
        """Score the current policies once on each row (``train``: the run's own rows) and count their calls.

        Returns:
            What the policy of ``trainer_adapter`` earned; the others' are in ``trajectory_builder.by_policy``.
        """
        self._display.phase("evaluation", name)
        try:
            report = await self.trajectory_builder.evaluate(name, dataset, config)
        except RolloutsFailedError:
            self._count([learner.rollouts.evaluation for learner in self._learners])
            raise
        self._count([report, *(learner.rollouts.evaluation for learner in self._learners[1:])])
        self._tell_failures(report)
        return report

    async def get_metrics(self, run_id: str) -> dict[str, Any]:
        """The numbers of the last epoch's row of metrics.jsonl (NAT logs them in one line); empty before the first."""
        rows = self._own.books.metrics.epochs()
        return {name: value for name, value in rows[-1].items() if isinstance(value, int | float)} if rows else {}

    def log_progress(self, epoch: int, metrics: dict[str, Any], output_dir: str | None = None) -> None:
        """Append an epoch's row to metrics.jsonl (of ``output_dir`` where given)."""
        log = MetricsLog(Path(output_dir) / "metrics.jsonl") if output_dir else self._own.books.metrics
        log.append(EPOCH, epoch, **metrics)

    async def cleanup(self) -> None:
        """Stop everything in flight; the run directory stays resumable."""
        self._display.close()
        if self._tracking is not None:
            interrupted = bool(self._learners) and self._own.books.state.status == "interrupted"
            await asyncio.to_thread(self._tracking.close, "interrupted" if interrupted else "failed", 10.0)
        if isinstance(self.trajectory_builder, EvsysTrajectoryBuilder):
            await self.trajectory_builder.cancel()
        if isinstance(self.trainer_adapter, EvsysTrainerAdapter):
            for adapter in self._adapters:
                await adapter.close()
            for rollouts in self.trajectory_builder.by_policy:
                await rollouts.policy.close()
        for learner in self._learners:  # last: until here this process writes to the run
            learner.books.run_dir.unlock()

    @property
    def last_report(self) -> RolloutReport:
        """The result of the last epoch's rollouts."""
        if self.trajectory_builder.report is None:
            raise ConfigError("no rollouts yet; run_epoch makes them")
        return self.trajectory_builder.report

    def _count(self, reports: Sequence[RolloutReport | None]) -> None:
        """Count what rollouts came to, also where that ends the run."""
        for learner, report in zip(self._learners, reports, strict=True):
            if report is not None:
                learner.books.count_rollouts(report)

    def _tell_failures(self, report: RolloutReport) -> None:
        for notice in failure_notices(report.failures, report.errors, len(report.replies), len(report.rewards)):
            self._display.notice(f"WARNING: {notice}")

    def _open(self) -> None:
        inputs = self._require_inputs
        name = self.trajectory_builder.by_policy[0].name if self._more_adapters else None
        own = RunBooks.open(self.run_config.output_dir, inputs.dump, resume=self.config.resume, policy=name)
        logger.info("run directory: %s", own.run_dir.path)
        self._tracking = self._track(own.run_dir.path)
        for rollouts, adapter in zip(self.trajectory_builder.by_policy, self._adapters, strict=True):
            books, curriculum, tracking = own, self._require_curriculum, self._tracking
            if self._learners:
                books = RunBooks.of_policy(own, rollouts.name, inputs.dump_of(rollouts.name))
                curriculum = Curriculum(self.run_config.curriculum_learning, self.config.seed)
                tracking = tracking.of_policy(rollouts.name)
            adapter.run_dir = books.run_dir.path
            rollouts.policy.set_checkpoint_dir(books.run_dir.checkpoints_dir)
            learner = Learner(rollouts, adapter, books, curriculum, tracking, self.config, agent=inputs.workflow)
            self._learners.append(learner)

    def _track(self, directory: Path) -> Tracking:
        run = TrackedRun(
            name=directory.name,
            project=directory.parent.name,
            directory=directory,
            config=redact(self._require_inputs.dump),
        )
        return Tracking(self._trackers, run, self._display.notice)

    @property
    def _adapters(self) -> list[EvsysTrainerAdapter]:
        return [self.trainer_adapter, *self._more_adapters]

    @property
    def _own(self) -> Learner:
        """The policy of ``trainer_adapter``."""
        if not self._learners:
            raise ConfigError("the run has not been opened; call run()")
        return self._learners[0]

    @property
    def _require_inputs(self) -> RunInputs:
        if self._inputs is None:
            raise ConfigError("the trainer is not initialized; await initialize() first")
        return self._inputs

    @property
    def _require_curriculum(self) -> Curriculum:
        if self._curriculum is None:
            raise ConfigError("the trainer is not initialized; await initialize() first")
        return self._curriculum
