"""The run: warm start, epochs of rollouts and training, validation, checkpoints, resume and the reports."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from nat.data_models.config import Config
from nat.data_models.finetuning import (
    FinetuneConfig,
    TrainingJobRef,
    TrainingJobStatus,
    TrainingStatusEnum,
    TrajectoryCollection,
)
from nat.finetuning.interfaces.finetuning_runner import Trainer

from ..algorithms.sdft import SdftStep
from ..algorithms.sft import SftStep
from ..config import EvsysPolicyConfig, EvsysTrainerConfig
from ..errors import ConfigError, JobError
from ..policy.policy import Policy
from ..report.metrics import EPOCH, VALIDATION, WARM_START, MetricsLog
from ..report.plot import plot_rewards
from ..report.progress import create_progress
from ..report.summary import print_at_exit
from .bookkeeping import RunBooks
from .curriculum import Curriculum
from .preflight import check_dataset, check_policy, resolve_config
from .signals import sigterm_cancels
from .trainer_adapter import EvsysTrainerAdapter
from .trajectory_builder import EvsysTrajectoryBuilder, RolloutReport
from .warm_start import load_demonstrations, warm_start

logger = logging.getLogger(__name__)

_STATUS_INTERVAL = 0.5
"""Seconds between two looks at a running job."""


def _nat_command() -> str:
    """What to type to run the `nat` of this process: its name where PATH finds it, else its path."""
    program = Path(sys.argv[0])
    found = shutil.which(program.name)
    if found is not None and Path(found).resolve() == program.resolve():
        return program.name
    return os.path.relpath(program)


class EvsysTrainer(Trainer):
    """NAT's Trainer for the evsys builder and adapter. Epochs are counted from 0 here and from 1 in what is shown."""

    trajectory_builder: EvsysTrajectoryBuilder
    trainer_adapter: EvsysTrainerAdapter

    def __init__(self, trainer_config: EvsysTrainerConfig) -> None:
        super().__init__(trainer_config)
        self.config = trainer_config
        self._progress = create_progress(trainer_config.progress)
        self._open_books: RunBooks | None = None
        self._curriculum: Curriculum | None = None
        self._validation_config: Config | None = None

    # -- NAT's interface --------------------------------------------------------------------------------------------

    async def initialize(self, run_config: FinetuneConfig) -> None:
        """Check everything, then load the model.

        Raises:
            ConfigError, DataError, ModelError: one line that says what to change.
        """
        if not isinstance(self.trajectory_builder, EvsysTrajectoryBuilder):
            raise ConfigError("finetuning.trajectory_builder must be an evsys_trajectory_builder for the evsys trainer")
        if not isinstance(self.trainer_adapter, EvsysTrainerAdapter):
            raise ConfigError("finetuning.trainer_adapter must be an evsys_trainer_adapter for the evsys trainer")
        self.run_config = run_config
        self._curriculum = Curriculum(run_config.curriculum_learning, self.config.seed)
        Policy.of(self._check_inputs()).begin_training()
        await super().initialize(run_config)
        self.trajectory_builder.on_rollout = self._progress.rollouts

    async def run(self, num_epochs: int) -> list[TrainingJobStatus]:
        """Run (or resume) all epochs.

        Returns:
            One final status per training job of this process.

        Raises:
            JobError: a training job failed or was canceled; the run can be resumed from the epoch before.
        """
        with self._progress, sigterm_cancels():
            self._open()
            try:
                await self._begin_or_reload(num_epochs)
                first = self._books.state.epochs_done
                statuses = [await self._epoch(epoch, num_epochs) for epoch in range(first, num_epochs)]
                await self._finish()
            except asyncio.CancelledError:
                self._books.stop("interrupted", self._how_to_resume())
                raise
            except Exception as error:
                self._books.stop("failed", f"{error}")
                raise
        return [status for status in statuses if status is not None]

    async def run_epoch(self, epoch: int, run_id: str) -> TrainingJobRef | None:
        """Roll out, apply the curriculum and submit one training job; None when no trajectory is left to train on."""
        self._progress.phase("rollouts", f"epoch {epoch + 1}")
        await self.trajectory_builder.start_run(run_id, {"epoch": epoch})
        collection = await self.trajectory_builder.finalize(run_id, {"epoch": epoch})
        self._books.count_rollouts(self._report)
        collection = self.apply_curriculum_learning(collection, epoch)
        if not collection.trajectories:
            logger.warning("epoch %d: no trajectory is left to train on; the policy stays as it is", epoch + 1)
            return None
        self._progress.phase("training", f"epoch {epoch + 1}")
        return await self.trainer_adapter.submit(collection, epoch=epoch)

    def apply_curriculum_learning(
        self, trajectory_collection: TrajectoryCollection, epoch: int
    ) -> TrajectoryCollection:
        """Leave out what the curriculum holds back in this epoch; it is counted under the curriculum's reasons."""
        selection = self._require_curriculum.select(trajectory_collection, epoch)
        self._books.count_dropped(selection.dropped_calls, selection.dropped_trajectories)
        return selection.collection

    def get_curriculum_state(self) -> dict[str, Any]:
        """NAT's keys: current_percentile, last_expansion_epoch, total_groups, included_groups, config."""
        return self._require_curriculum.state()

    async def run_validation_evaluation(self, epoch: int, run_id: str) -> dict[str, Any]:
        """Score the current policy on the held-out dataset. Unlike NAT's, an error is raised, not a reward of 0.

        Returns:
            avg_reward, min_reward, max_reward, num_examples, epoch, dataset_type.
        """
        report = await self._evaluate("heldout", self._validation_dataset, self._validation_config)
        return {
            "avg_reward": report.mean_reward,
            "min_reward": min(report.rewards),
            "max_reward": max(report.rewards),
            "num_examples": len(report.rewards),
            "epoch": epoch,
            "dataset_type": "validation",
        }

    async def get_metrics(self, run_id: str) -> dict[str, Any]:
        """The last epoch's row of metrics.jsonl; empty before the first."""
        rows = [row for row in self._books.metrics.rows() if row["event"] == EPOCH]
        return rows[-1] if rows else {}

    def log_progress(self, epoch: int, metrics: dict[str, Any], output_dir: str | None = None) -> None:
        """Append an epoch's row to metrics.jsonl (of ``output_dir`` where given)."""
        log = MetricsLog(Path(output_dir) / "metrics.jsonl") if output_dir else self._books.metrics
        log.append(EPOCH, epoch, **metrics)

    async def cleanup(self) -> None:
        """Stop what is in flight; the run directory stays resumable."""
        self._progress.close()
        if self._open_books is not None:
            self._open_books.run_dir.unlock()
        if isinstance(self.trajectory_builder, EvsysTrajectoryBuilder):
            await self.trajectory_builder.cancel()
        if isinstance(self.trainer_adapter, EvsysTrainerAdapter):
            await self.trainer_adapter.close()
            await self._policy.close()

    # -- the steps of a run -----------------------------------------------------------------------------------------

    def _open(self) -> None:
        run = self.run_config.run_configuration
        dump = resolve_config(run).model_dump(mode="json", by_alias=True, exclude={"finetuning": {"run_configuration"}})
        if run is not None:
            dump["command_line"] = run.model_dump(
                mode="json", include={"dataset", "validation_dataset", "validation_config_file", "result_json_path"}
            )
        self._open_books = RunBooks.open(self.run_config.output_dir, dump, resume=self.config.resume)
        run_dir = self._open_books.run_dir
        self.trainer_adapter.run_dir = run_dir.path
        self._policy.set_checkpoint_dir(run_dir.checkpoints_dir)
        logger.info("run directory: %s", run_dir.path)

    async def _begin_or_reload(self, num_epochs: int) -> None:
        books = self._books
        record = books.state.last_checkpoint()
        if record is None:
            await self._begin()
            return
        books.rewind()
        self._require_curriculum.load_state(books.state.curriculum)
        source = str(books.run_dir.locate(record.training_state or record.adapter))
        await self._policy.backend.load_state(source, with_optimizer=True)
        await self._policy.publish()
        done = books.state.epochs_done
        if done >= num_epochs:
            logger.warning("the run has finished all of its %d epochs; raise finetuning.num_epochs to go on", done)
        self._progress.phase("resume", f"after epoch {done} of {num_epochs}, from {source}")

    async def _begin(self) -> None:
        if self.config.warm_start is not None:
            self._progress.phase("warm start", str(self.config.warm_start.demonstrations))
            started = time.monotonic()
            metrics = await warm_start(self._policy, self.config.warm_start, self._show_warm_start)
            self._books.metrics.append(WARM_START, 0, **metrics, seconds=round(time.monotonic() - started, 3))
            self._books.state.warm_started = True
        state = self._books.state
        state.train_reward_before = (await self._evaluate("train", None)).mean_reward
        state.heldout_reward_before = await self._validate(0)
        await self._save_checkpoint(0, state.heldout_reward_before)

    async def _epoch(self, epoch: int, num_epochs: int) -> TrainingJobStatus | None:
        started = time.monotonic()
        ref = await self.run_epoch(epoch, self._books.run_dir.path.name)
        rolled_out = time.monotonic()
        status = None if ref is None else await self._wait(ref)
        if status is not None:
            self._books.count_job(status)
        row = self._row(epoch, status, rolled_out - started, time.monotonic() - rolled_out)
        if self._validation_dataset is None:
            self._books.reward_of_last_checkpoint(row["reward_mean"])
        heldout = await self._validate(epoch + 1) if self._is_validation_due(epoch + 1, num_epochs) else None
        self.log_progress(epoch + 1, row)
        await self._save_checkpoint(epoch + 1, heldout)
        self._progress.epoch_done(epoch + 1, num_epochs, row)
        plot_rewards(self._books.metrics.rows(), self._books.run_dir.plot_path)
        return status

    async def _wait(self, ref: TrainingJobRef) -> TrainingJobStatus:
        """Wait for the job and show its progress.

        Raises:
            JobError: it did not complete.
        """
        done = asyncio.ensure_future(self.trainer_adapter.wait_until_complete(ref, poll_interval=60.0))
        try:
            while not (await asyncio.wait({done}, timeout=_STATUS_INTERVAL))[0]:
                self._progress.job(await self.trainer_adapter.status(ref))
        finally:
            done.cancel()
        status = done.result()
        self._progress.job(status)
        if status.status != TrainingStatusEnum.COMPLETED:
            raise JobError(f"training job {status.status.value}: {status.message}. {self._how_to_resume()}")
        return status

    async def _finish(self) -> None:
        books = self._books
        if books.state.status != "finished":
            report = await self._evaluate("train", None)
            books.state.train_reward_after = report.mean_reward
            if self._validation_dataset is None:
                books.reward_of_last_checkpoint(report.mean_reward)
        books.count_stray_calls(self._policy.recorder.totals)
        summary = books.finish(serve_command=self._serve_command())
        plot_rewards(books.metrics.rows(), books.run_dir.plot_path)
        print_at_exit(summary.format(books.run_dir.summary_path))

    # -- helpers ----------------------------------------------------------------------------------------------------

    def _show_warm_start(self, step: SftStep | SdftStep) -> None:
        self._progress.steps(step.step, step.total_steps, f"loss per token {step.loss:.3f}")

    async def _validate(self, epochs_done: int) -> float | None:
        """Held-out reward, also written to metrics.jsonl; None without a validation dataset."""
        if self._validation_dataset is None:
            return None
        metrics = await self.run_validation_evaluation(epochs_done, self._books.run_dir.path.name)
        reward = float(metrics["avg_reward"])
        self._books.metrics.append(VALIDATION, epochs_done, reward=reward, num_examples=metrics["num_examples"])
        self._books.state.heldout_reward_after = reward
        self._progress.validation(epochs_done, reward)
        return reward

    async def _evaluate(self, name: str, dataset: Path | None, config: Config | None = None) -> RolloutReport:
        self._progress.phase("evaluation", name)
        report = await self.trajectory_builder.evaluate(name, dataset, config)
        self._books.count_rollouts(report)
        return report

    async def _save_checkpoint(self, epochs_done: int, reward: float | None) -> None:
        """Weights with optimizer state; written before the state file names them."""
        name = f"epoch-{epochs_done:04d}"
        uri = await self._policy.backend.save_full_state(name)
        curriculum = self._require_curriculum.state() if epochs_done else {}
        self._books.commit(epochs_done, name, uri, reward, curriculum=curriculum, keep=self.config.keep_checkpoints)

    def _row(self, epoch: int, status: TrainingJobStatus | None, rollout_s: float, training_s: float) -> dict[str, Any]:
        """An epoch's row of metrics.jsonl."""
        report = self._report
        rewards = report.rewards
        job = dict(status.metadata or {}) if status is not None else {}
        return {
            "reward_mean": report.mean_reward,
            "reward_min": min(rewards),
            "reward_max": max(rewards),
            "reward_std": statistics.pstdev(rewards),
            "rollouts": len(rewards) + sum(report.lost.values()),
            "failed_rollouts": report.failed_rollouts,
            "errors": report.errors,
            "calls": report.tally.calls,
            "trained": job.get("trained", 0),
            "loss": job.get("loss"),
            "policy_version": self._policy.version,
            "seconds": round(rollout_s + training_s, 3),
            "rollout_seconds": round(rollout_s, 3),
            "training_seconds": round(training_s, 3),
            "curriculum_percentile": self._require_curriculum.percentile(epoch),
            "job": job,
        }

    def _is_validation_due(self, epochs_done: int, num_epochs: int) -> bool:
        run = self.run_config.run_configuration
        interval = self.config.validation_interval or (run.validation_interval if run else 5)
        return self._validation_dataset is not None and (epochs_done % interval == 0 or epochs_done == num_epochs)

    def _check_inputs(self) -> EvsysPolicyConfig:
        """Held-out rows and demonstrations, before anything is loaded. Returns the policy's configuration."""
        run = self.run_config.run_configuration
        config = resolve_config(run)
        policy = check_policy(config, self.run_config)[1]
        if run is not None and run.validation_config_file is not None:
            from nat.runtime.loader import load_config

            self._validation_config = load_config(Path(run.validation_config_file))
            if check_policy(self._validation_config, self.run_config)[1] != policy:
                raise ConfigError(
                    f"{run.validation_config_file}: its policy differs from the trained one; make both the same"
                )
        if self._validation_dataset is not None:
            check_dataset(self._validation_config or config, self._validation_dataset, what="validation_dataset")
        if self.config.warm_start is not None:
            load_demonstrations(self.config.warm_start.demonstrations)
        return policy

    def _how_to_resume(self) -> str:
        return f"To go on from the last finished epoch: -o trainers.{self.run_config.trainer}.resume true"

    def _serve_command(self) -> str:
        import click

        context = click.get_current_context(silent=True)
        config_file = Path(str(context.params.get("config_file", "CONFIG.yml"))) if context else Path("CONFIG.yml")
        if config_file.is_relative_to(Path.cwd()):
            config_file = config_file.relative_to(Path.cwd())
        return f'{_nat_command() if context else "nat"} run --config_file {config_file} --input "…"'

    @property
    def _validation_dataset(self) -> Path | None:
        run = self.run_config.run_configuration
        if run is not None and run.validation_dataset is not None:
            return Path(run.validation_dataset)
        return self.config.validation_dataset

    @property
    def _policy(self) -> Policy:
        return self.trajectory_builder.policy

    @property
    def _report(self) -> RolloutReport:
        if self.trajectory_builder.report is None:
            raise ConfigError("no rollouts yet; run_epoch makes them")
        return self.trajectory_builder.report

    @property
    def _books(self) -> RunBooks:
        if self._open_books is None:
            raise ConfigError("the run has not been opened; call run()")
        return self._open_books

    @property
    def _require_curriculum(self) -> Curriculum:
        if self._curriculum is None:
            raise ConfigError("the trainer is not initialized; await initialize() first")
        return self._curriculum
