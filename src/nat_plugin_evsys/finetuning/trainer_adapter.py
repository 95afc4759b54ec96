"""NAT's TrainerAdapter over a ``Backend``: every submit is an asyncio job on the policy's LoRA adapter."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from nat.data_models.finetuning import (
    FinetuneConfig,
    TrainingJobRef,
    TrainingJobStatus,
    TrainingStatusEnum,
    Trajectory,
    TrajectoryCollection,
)
from nat.finetuning.interfaces.trainer_adapter import TrainerAdapter
from pydantic import ValidationError

from nat_plugin_evsys.calls import CallFate, CallKey, DropReason
from nat_plugin_evsys.config import EvsysTrainerAdapterConfig
from nat_plugin_evsys.errors import ConfigError, EngineClosedError, ModelError
from nat_plugin_evsys.finetuning.job_queue import BACKEND, JobQueue, progress_of
from nat_plugin_evsys.finetuning.job_work import JobWork, PolicyUnderTraining, groups_of
from nat_plugin_evsys.json_lines import append_json_lines
from nat_plugin_evsys.rollouts.plain_episodes import RecordedRows, recorded_rows
from nat_plugin_evsys.rollouts.preferences import has_preferences
from nat_plugin_evsys.rollouts.roles import validate_episode_order
from nat_plugin_evsys.rollouts.trajectories import CALLS_KEY, TrajectoryGroup
from nat_plugin_evsys.training.learning_rate import default_rate

if TYPE_CHECKING:
    import art

    from nat_plugin_evsys.backends.base import Backend

logger = logging.getLogger(__name__)

HEALTH_TIMEOUT = 30.0
"""Seconds that the policy's backend has to answer ``is_healthy``."""


class EvsysTrainerAdapter(TrainerAdapter):
    """Turns trajectory collections into training jobs, which run one after another in the order of submission.

    Attributes:
        run_dir: where ``jobs.jsonl``, ``trainer_adapter.jsonl`` and ``datums-<job>.jsonl`` go; None writes none.
        health_timeout: seconds that ``is_healthy`` waits for an answer.
    """

    def __init__(self, adapter_config: EvsysTrainerAdapterConfig, policy: PolicyUnderTraining) -> None:
        super().__init__(adapter_config)
        self.config = adapter_config
        self.policy = policy
        self.run_dir: Path | None = None
        self.health_timeout = HEALTH_TIMEOUT
        self._num_epochs: int | None = None
        self._work = JobWork(adapter_config, policy)
        self._jobs = JobQueue()
        self._closed = False

    @property
    def remote_backend(self) -> Backend:
        """What trains and serves the policy: NAT's ART adapter has an ``art.Backend`` here. After ``initialize``."""
        return self.policy.backend

    @property
    def model(self) -> PolicyUnderTraining:
        """The model under training: NAT's ART adapter has an ``art.TrainableModel`` here."""
        return self.policy

    @property
    def _model_internal_config(self) -> dict[str, Any]:
        """What the model is trained with: NAT's ART adapter has an ``art.dev.InternalModelConfig`` here."""
        return self.config.model_dump()

    @property
    def _training_jobs(self) -> dict[str, asyncio.Task[None]]:
        return self.training_jobs

    @property
    def training_jobs(self) -> dict[str, asyncio.Task[None]]:
        """The task of every job that runs, waits, or is among the newest that have ended, by job id; oldest first."""
        return self._jobs.tasks

    async def initialize(self, run_config: FinetuneConfig) -> None:
        """Take over the run's configuration and load the policy.

        Raises:
            ModelError: the model cannot be loaded, or its backend does not answer.
        """
        reward = self.config.reward
        await super().initialize(run_config)  # sets the run's reward over one of its own
        self.adapter_config.reward = reward or run_config.reward_function
        self._num_epochs = run_config.num_epochs
        self._work = JobWork(self.config, self.policy, self._num_epochs)
        await self.policy.ensure_loaded()
        self.choose_rate()
        if not await self.is_healthy():
            raise ModelError(
                f"the backend of policy `{self.config.policy}` was loaded but did not answer a request within "
                f"{self.health_timeout:g} s; see the log above for its error"
            )

    def choose_rate(self) -> None:
        """Take the learning rate for the width of the model, which is loaded, unless the user chose one."""
        rate = default_rate(self.policy.backend.get_architecture())
        self._prefer("learning_rate", rate, "the default for a model of this width")

    def expect_stale_calls(self, cause: str) -> None:
        """Calls may be older than the policy that trains on them: clip their ratios, unless the user chose a loss.

        Args:
            cause: the setting that makes them so.

        Raises:
            ConfigError: ``recompute_logprobs``, which only the policy that sampled can do.
        """
        if self.config.recompute_logprobs:
            raise ConfigError(
                f"recompute_logprobs does not go with {cause}, because another policy than the one under training "
                "sampled what an epoch trains on; set recompute_logprobs: false"
            )
        self.prefer_loss("ppo", "what is trained on is older than the policy")

    def expect_records(self, cause: str) -> None:
        """Calls are records, which never become those of the policy: measure how far steps move it from its own start.

        Raises:
            ConfigError: see ``expect_stale_calls``.
        """
        self.expect_stale_calls(cause)
        self._work.on_records = True

    def prefer_loss(self, loss_fn: Literal["ppo", "cross_entropy"], why: str) -> None:
        """Use this loss, unless the user chose one.

        Raises:
            ConfigError: the user chose settings that do not go with it.
        """
        self._prefer("loss_fn", loss_fn, f"because {why}")

    def _prefer(self, setting: str, value: Any, why: str) -> None:
        if setting in self.config.model_fields_set:
            return
        chosen = self.config.model_dump(exclude_unset=True)
        try:
            self.config = type(self.config).model_validate({**chosen, setting: value})
        except ValidationError as error:
            reason = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise ConfigError(f"{setting} is {value}, {why}, and {reason}") from None
        self._work = JobWork(self.config, self.policy, self._num_epochs)
        logger.info("trainer adapter: %s is %s, %s", setting, value, why)

    def scale_rate(self, factor: float) -> None:
        """Multiply the learning rate of all later jobs by ``factor``; this replaces any earlier factor."""
        self._work.rate_factor = factor

    def resume_after(self, jobs: Sequence[Mapping[str, Any]]) -> None:
        """Continue after the jobs of an earlier process, given their metadata from metrics.jsonl."""
        for metrics in (job.get("metrics") or {} for job in jobs):
            self._work.step_size.factor = float(metrics.get("lr_factor", self._work.step_size.factor))
            self._work.step_size.taken += int(metrics.get("steps", 0))

    def warmup_notice(self) -> str | None:
        """What to say at the end of a run whose learning rate was still rising, or None."""
        return self._work.warmup_notice()

    async def is_healthy(self) -> bool:
        """Ask the policy's backend; an error or no answer in ``health_timeout`` seconds is logged and False."""
        try:
            return bool(await asyncio.wait_for(self.policy.is_healthy(), self.health_timeout))
        except TimeoutError:
            logger.warning("the policy's backend gave no answer within %g s", self.health_timeout)
        except Exception:  # a backend may fail in any way, and each of them means unhealthy
            logger.warning("the policy's backend failed its health check", exc_info=True)
        return False

    async def submit(self, trajectories: TrajectoryCollection, *, epoch: int | None = None) -> TrainingJobRef:
        """Validate a collection and start its training job; returns at once.

        Args:
            trajectories: one list of trajectories per dataset row, as ``EvsysTrajectoryBuilder`` builds them; or
                others whose assistant items have logprobs, or with ``retokenize`` none (``rollouts.plain_episodes``);
                or trajectories whose episodes are all preference pairs (``DPOItem``), which are trained with DPO.
            epoch: for the record, and part of the shuffle seed.

        Returns:
            a ref whose metadata holds ``job_id`` (a new one for every submit) and ``epoch`` if given.

        Raises:
            ValueError: the collection is empty, mixes episodes with preference pairs, or a trajectory in it is
                invalid; nothing was started.
            ConfigError: ``save_datums`` without a run directory, or a setting that has no effect on preference pairs.
            EngineClosedError: the adapter has been closed.
        """
        if self._closed:
            raise EngineClosedError("the trainer adapter is closed and takes no more jobs")
        rows = trajectories.trajectories
        if has_preferences(rows):
            work, sizes = self._work.on_pairs(rows, epoch)
        else:
            work, sizes = self._work.on_groups(await self._recorded(rows), epoch)
        job = self._jobs.start(
            trajectories.run_id, work, sizes, epoch, run_dir=self.run_dir, save_datums=self.config.save_datums
        )
        metadata: dict[str, Any] = {"job_id": job.job_id}
        if epoch is not None:
            metadata["epoch"] = epoch
        return TrainingJobRef(run_id=trajectories.run_id, backend=BACKEND, metadata=metadata)

    async def status(self, ref: TrainingJobRef) -> TrainingJobStatus:
        """The current state of a job, during and after it; asking changes nothing.

        ``metadata`` holds job_id, phase, step, steps, loss, tokens_per_second and the metrics of the steps so far;
        while the job runs also seconds_since_heartbeat; once it has ended also seconds, policy_version and where every
        call went (calls, trained, dropped, trajectories). A failed job's ``message`` names the first cause.

        Raises:
            ValueError: unknown job; the text lists what is known.
        """
        return self._jobs.find(ref).status(BACKEND)

    def metrics_by_step(self, ref: TrainingJobRef) -> list[dict[str, float]]:
        """The metrics of each optimizer step that a job has finished so far, by Tinker's names.

        Raises:
            ValueError: unknown job.
        """
        return list(self._jobs.find(ref).report.metrics_by_step)

    async def wait_until_complete(self, ref: TrainingJobRef, poll_interval: float = 10.0) -> TrainingJobStatus:
        """Wait for a job's end and return its final status.

        Wakes at once when the job ends. Until then progress is logged every ``poll_interval`` seconds. Cancelling the
        wait leaves the job alone.

        Raises:
            ValueError: unknown job, or a poll_interval that is not positive.
        """
        if poll_interval <= 0:
            raise ValueError(f"poll_interval is {poll_interval}; it must be a positive number of seconds")
        job = self._jobs.find(ref)
        while not await job.wait(poll_interval):
            self.log_progress(ref, progress_of(job.status(BACKEND)))
        return job.status(BACKEND)

    def take_fates(self, ref: TrainingJobRef) -> dict[CallKey, CallFate]:
        """What became of each call of an ended job, which then forgets it; empty for a job that has not ended.

        Raises:
            ValueError: unknown job.
        """
        account = self._jobs.find(ref).account
        if account is None:
            return {}
        fates, account.fates = account.fates, {}
        return fates

    async def cancel(self, ref: TrainingJobRef) -> TrainingJobStatus:
        """Cancel a job: at once if it is pending, else after the current optimizer step.

        Returns the status right afterwards; a job that has ended stays as it is.

        Raises:
            ValueError: unknown job.
        """
        job = self._jobs.find(ref)
        pending = job.state is TrainingStatusEnum.PENDING
        job.cancel()
        if pending:
            await job.wait()
        return job.status(BACKEND)

    def log_progress(self, ref: TrainingJobRef, metrics: dict[str, Any], output_dir: str | None = None) -> None:
        """Log metrics of a job, and append them as a JSON line to ``trainer_adapter.jsonl``.

        Args:
            output_dir: directory of the file; default ``run_dir``; without either there is only the log.
        """
        record = {"run_id": ref.run_id, **(ref.metadata or {}), **metrics}
        logger.info("training job: %s", ", ".join(f"{key}={value}" for key, value in record.items()))
        directory = Path(output_dir) if output_dir is not None else self.run_dir
        if directory is not None:
            append_json_lines(directory / "trainer_adapter.jsonl", [record])

    async def close(self) -> None:
        """Cancel unfinished jobs and wait until nothing runs any more. The owner of the policy closes it."""
        self._closed = True
        await self._jobs.cancel_all()

    async def _validate_episode_order(self, traj: Trajectory) -> None:
        """Check the order of roles; see ``validate_episode_order``.

        Raises:
            ValueError: names position, role and rule.
        """
        validate_episode_order(traj, "trajectory")

    async def _recorded(self, rows: list[list[Trajectory]]) -> RecordedRows:
        """The rows with the calls of their plain trajectories, if there are any."""
        if all(CALLS_KEY in (trajectory.metadata or {}) for row in rows for trajectory in row):
            return RecordedRows(rows)
        await self.policy.ensure_loaded()
        recorded = await asyncio.to_thread(recorded_rows, rows, self.policy.renderer, retokenize=self.config.retokenize)
        if left_out := recorded.left_out[DropReason.TEXT_ONLY]:
            logger.warning(
                "%d trajectories have text alone (text_only) and are left out; set retokenize: true on the trainer "
                "adapter to train on the tokens of their text",
                left_out,
            )
        if self.config.retokenize:
            logger.warning("retokenize: replies are trained on as the tokens of their text; %s", recorded.drift)
        return recorded

    @overload
    async def _construct_trajectory_groups(
        self, trajectory_lists: list[list[Trajectory]], kind: Literal["evsys"] = "evsys"
    ) -> list[TrajectoryGroup]: ...

    @overload
    async def _construct_trajectory_groups(
        self, trajectory_lists: list[list[Trajectory]], kind: Literal["art"]
    ) -> list[art.TrajectoryGroup]: ...

    async def _construct_trajectory_groups(
        self, trajectory_lists: list[list[Trajectory]], kind: Literal["evsys", "art"] = "evsys"
    ) -> list[TrajectoryGroup] | list[art.TrajectoryGroup]:
        """Validate every trajectory and group them; rows without a trajectory get no group.

        Args:
            trajectory_lists: one list per dataset row.
            kind: ``evsys`` for this package's groups, ``art`` for ``art.TrajectoryGroup`` (imports art, which takes
                seconds).

        Raises:
            ValueError: there is no trajectory at all, or one is invalid.
            ConfigError: ``art`` was asked for and is not installed.
        """
        groups = groups_of((await self._recorded(trajectory_lists)).rows)
        if kind == "evsys":
            return groups
        if kind != "art":
            raise ConfigError(f"unknown kind of trajectory group `{kind}`; it must be `evsys` or `art`")
        from nat_plugin_evsys.rollouts.art_groups import to_art_groups

        return await asyncio.to_thread(to_art_groups, groups)
