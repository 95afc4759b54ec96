"""NAT's TrainerAdapter over a ``Backend``: every submit is an asyncio job on the policy's LoRA adapter."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, overload

from nat.data_models.finetuning import (
    FinetuneConfig,
    TrainingJobRef,
    TrainingJobStatus,
    TrainingStatusEnum,
    Trajectory,
    TrajectoryCollection,
)
from nat.finetuning.interfaces.trainer_adapter import TrainerAdapter

from ..config import EvsysTrainerAdapterConfig
from ..errors import ConfigError, DataError, EngineClosedError, ModelError
from ..jobs.job import TrainingJob
from ..jobs.ledger import JobLedger, append_json_lines
from ..rollouts.preferences import has_preferences, preference_trajectories
from ..rollouts.roles import validate_episode_order
from ..rollouts.trajectories import TrajectoryGroup, group_of

if TYPE_CHECKING:
    import art
    from tinker import types

    from ..algorithms.policy_gradient import TrainingSettings
    from ..backends.base import Backend
    from ..jobs.preference import PreferenceSettings, PreferenceWork, Renderer
    from ..jobs.training import TrainingWork

logger = logging.getLogger(__name__)

BACKEND = "evsys"
"""``TrainingJobRef.backend`` of every job of this adapter."""

NOT_FOR_PAIRS = ("loss_fn", "loss_fn_config", "advantage", "groups_per_step", "merge_calls")
"""Settings that preference pairs have no use for; refused with them unless they have their defaults."""

HEALTH_TIMEOUT = 30.0
"""Seconds that the policy's backend has to answer ``is_healthy``."""


class PolicyUnderTraining(Protocol):
    """What the adapter needs of the policy."""

    @property
    def backend(self) -> Backend:
        """The live training client; available once ``ensure_loaded`` has returned."""
        ...

    @property
    def renderer(self) -> Renderer:
        """Messages -> token ids; available once ``ensure_loaded`` has returned."""
        ...

    async def ensure_loaded(self) -> None:
        """Load the model unless it is loaded."""
        ...

    async def publish(self, name: str | None = None) -> int:
        """Make the present weights the next served policy version and return its number."""
        ...

    async def is_healthy(self) -> bool:
        """True when the backend answers a real request."""
        ...


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
        self._jobs: dict[str, TrainingJob] = {}
        self._turn = asyncio.Lock()
        self._closed = False

    @property
    def training_jobs(self) -> dict[str, asyncio.Task[None]]:
        """The task of every job ever submitted, by job id, in the order of submission."""
        return {job_id: job.task for job_id, job in self._jobs.items()}

    async def initialize(self, run_config: FinetuneConfig) -> None:
        """Take over the run's configuration and load the policy.

        Raises:
            ModelError: the model cannot be loaded, or its backend does not answer.
        """
        await super().initialize(run_config)
        await self.policy.ensure_loaded()
        if not await self.is_healthy():
            raise ModelError(
                f"the backend of policy `{self.config.policy}` was loaded but did not answer a request within "
                f"{self.health_timeout:g} s; see the log above for its error"
            )

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
                trajectories whose episodes are all preference pairs (``DPOItem``), which are trained with DPO.
            epoch: for the record, and part of the shuffle seed.

        Returns:
            a ref whose metadata holds ``job_id`` (a new one for every submit) and ``epoch`` if given.

        Raises:
            ValueError: the collection is empty, mixes episodes with preference pairs, or a trajectory in it is
                invalid; nothing was started.
            ConfigError: ``save_datums`` without a run directory, or a setting that preference pairs have no use for.
            EngineClosedError: the adapter has been closed.
        """
        if self._closed:
            raise EngineClosedError("the trainer adapter is closed and takes no more jobs")
        work, sizes = await self._work(trajectories.trajectories, epoch)
        job = self._start(trajectories.run_id, work, sizes, epoch)
        metadata: dict[str, Any] = {"job_id": job.job_id}
        if epoch is not None:
            metadata["epoch"] = epoch
        return TrainingJobRef(run_id=trajectories.run_id, backend=BACKEND, metadata=metadata)

    async def status(self, ref: TrainingJobRef) -> TrainingJobStatus:
        """The present state of a job; asking changes nothing, before and after the end.

        ``metadata`` holds job_id, phase, step, steps, loss and tokens_per_second; while the job runs also
        seconds_since_heartbeat; once it has ended also seconds, metrics, policy_version and where every call went
        (calls, trained, dropped, trajectories). A failed job's ``message`` names the first cause.

        Raises:
            ValueError: unknown job; the text lists what is known.
        """
        return self._job(ref).status(BACKEND)

    async def wait_until_complete(self, ref: TrainingJobRef, poll_interval: float = 10.0) -> TrainingJobStatus:
        """Wait for a job's end and return its final status.

        Wakes at once when the job ends. Until then progress is logged every ``poll_interval`` seconds. Cancelling the
        wait leaves the job alone.

        Raises:
            ValueError: unknown job, or a poll_interval that is not positive.
        """
        if poll_interval <= 0:
            raise ValueError(f"poll_interval is {poll_interval}; it must be a positive number of seconds")
        job = self._job(ref)
        while not await job.wait(poll_interval):
            self.log_progress(ref, _progress(job.status(BACKEND)))
        return job.status(BACKEND)

    async def cancel(self, ref: TrainingJobRef) -> TrainingJobStatus:
        """Cancel a job: at once while it is pending, else at the next border of an optimizer step.

        Returns the status right afterwards; a job that has ended stays as it is.

        Raises:
            ValueError: unknown job.
        """
        job = self._job(ref)
        pending = job.state is TrainingStatusEnum.PENDING
        job.cancel()
        if pending:
            await job.wait()
        return job.status(BACKEND)

    def log_progress(self, ref: TrainingJobRef, metrics: dict[str, Any], output_dir: str | None = None) -> None:
        """Log metrics of a job, and append them as a JSON line to ``trainer_adapter.jsonl``.

        Args:
            output_dir: where the file lies; default ``run_dir``; without either there is only the log.
        """
        record = {"run_id": ref.run_id, **(ref.metadata or {}), **metrics}
        logger.info("training job: %s", ", ".join(f"{key}={value}" for key, value in record.items()))
        directory = Path(output_dir) if output_dir is not None else self.run_dir
        if directory is not None:
            append_json_lines(directory / "trainer_adapter.jsonl", [record])

    async def close(self) -> None:
        """Cancel what is not finished and wait until nothing runs any more. The policy is left to its owner."""
        self._closed = True
        open_jobs = [job for job in self._jobs.values() if not job.ended]
        # Last first, so that no pending job gets its turn meanwhile.
        for job in reversed(open_jobs):
            job.cancel()
        for job in open_jobs:
            await job.wait()

    async def _validate_episode_order(self, traj: Trajectory) -> None:
        """Check the order of roles; see ``validate_episode_order``.

        Raises:
            ValueError: names position, role and rule.
        """
        validate_episode_order(traj, "trajectory")

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
        """Validate every trajectory and group them; rows without a trajectory make no group.

        Args:
            trajectory_lists: one list per dataset row.
            kind: ``evsys`` for this package's groups, ``art`` for ``art.TrajectoryGroup`` (imports art, which takes
                seconds).

        Raises:
            ValueError: there is no trajectory at all, or one is invalid.
            ConfigError: ``art`` was asked for and is not installed.
        """
        groups = [group_of(row, index) for index, row in enumerate(trajectory_lists) if row]
        if not groups:
            raise DataError(
                "the collection holds no trajectory, so there is nothing to train on; look at the dropped rollouts of "
                "the trajectory builder"
            )
        if kind == "evsys":
            return groups
        if kind != "art":
            raise ConfigError(f"unknown kind of trajectory group `{kind}`; it must be `evsys` or `art`")
        from ..rollouts.art_groups import to_art_groups

        return await asyncio.to_thread(to_art_groups, groups)

    async def _work(
        self, rows: list[list[Trajectory]], epoch: int | None
    ) -> tuple[TrainingWork | PreferenceWork, dict[str, int]]:
        """The work on a collection, and its sizes for the ledger."""
        from ..jobs.training import TrainingWork

        if has_preferences(rows):
            return self._preference_work(rows, epoch)
        groups = await self._construct_trajectory_groups(rows)
        work = TrainingWork(groups, self._settings(epoch), self._loaded_backend, self.policy.publish)
        trajectories = sum(len(group.rewards_G) for group in groups)
        calls = sum(group.num_calls for group in groups)
        return work, {"groups": len(groups), "trajectories": trajectories, "calls": calls}

    def _preference_work(
        self, rows: list[list[Trajectory]], epoch: int | None
    ) -> tuple[PreferenceWork, dict[str, int]]:
        from ..jobs.preference import PreferenceWork

        fields = type(self.config).model_fields
        useless = [name for name in NOT_FOR_PAIRS if getattr(self.config, name) != fields[name].default]
        if useless:
            raise ConfigError(
                f"the collection holds DPO preference pairs, for which {', '.join(useless)} would have no effect; "
                "remove it from the trainer adapter's config (pairs are trained by dpo_beta and dpo_batch_size)"
            )
        found = preference_trajectories(rows)
        work = PreferenceWork(
            found,
            self._preference_settings(epoch),
            self._loaded_backend,
            lambda: self.policy.renderer,
            self.policy.publish,
        )
        pairs = sum(len(trajectory.items) for trajectory in found)
        groups = len({trajectory.group for trajectory in found})
        return work, {"groups": groups, "trajectories": len(found), "calls": 0, "pairs": pairs}

    def _start(
        self, run_id: str, work: TrainingWork | PreferenceWork, sizes: dict[str, int], epoch: int | None
    ) -> TrainingJob:
        if self.config.save_datums and self.run_dir is None:
            raise ConfigError("save_datums is set, but the adapter has no run_dir to write to; set adapter.run_dir")
        ledger = JobLedger(self.run_dir) if self.run_dir is not None else None
        job = TrainingJob(run_id, work, self._turn, epoch=epoch, on_end=lambda job: _record_end(ledger, job))
        if self.config.save_datums and self.run_dir is not None:
            work.datum_log = self.run_dir / f"datums-{job.job_id}.jsonl"
        if ledger is not None:
            ledger.submitted(job.job_id, run_id, epoch=epoch, **sizes)
        self._jobs[job.job_id] = job
        return job

    async def _loaded_backend(self) -> Backend:
        await self.policy.ensure_loaded()
        return self.policy.backend

    def _settings(self, epoch: int | None) -> TrainingSettings:
        from ..algorithms.policy_gradient import TrainingSettings

        config = self.config
        return TrainingSettings(
            loss_fn=config.loss_fn,
            loss_fn_config=config.loss_fn_config,
            adam=self._adam(),
            advantage=config.advantage,
            groups_per_step=config.groups_per_step,
            passes=config.passes,
            shuffle_key=self._shuffle_key(epoch),
            merge_calls=config.merge_calls,
        )

    def _preference_settings(self, epoch: int | None) -> PreferenceSettings:
        from ..jobs.preference import PreferenceSettings

        config = self.config
        return PreferenceSettings(
            adam=self._adam(),
            beta=config.dpo_beta,
            batch_size=config.dpo_batch_size,
            passes=config.passes,
            shuffle_key=self._shuffle_key(epoch),
        )

    def _adam(self) -> types.AdamParams:
        from tinker import types

        names = ("learning_rate", "beta1", "beta2", "eps", "weight_decay", "grad_clip_norm")
        return types.AdamParams(**{name: getattr(self.config, name) for name in names})

    def _shuffle_key(self, epoch: int | None) -> str:
        return f"{self.config.shuffle_seed}/{epoch or 0}"

    def _job(self, ref: TrainingJobRef) -> TrainingJob:
        job_id = (ref.metadata or {}).get("job_id")
        of_run = [job for job in self._jobs.values() if job.run_id == ref.run_id]
        fitting = of_run if job_id is None else [job for job in of_run if job.job_id == job_id]
        if ref.backend == BACKEND and fitting:
            return fitting[-1]
        known = ", ".join(f"{job.job_id} (run {job.run_id})" for job in self._jobs.values()) or "none"
        raise ValueError(
            f"no training job for run_id `{ref.run_id}`, backend `{ref.backend}`, job_id `{job_id}`; "
            f"known jobs of backend `{BACKEND}`: {known}"
        )


def _record_end(ledger: JobLedger | None, job: TrainingJob) -> None:
    if ledger is not None:
        status = job.status(BACKEND)
        fields = {"status": status.status.value, "progress": status.progress, "message": status.message}
        details = {key: value for key, value in (status.metadata or {}).items() if key != "job_id"}
        ledger.finished(job.job_id, job.run_id, **fields, **details)


def _progress(status: TrainingJobStatus) -> dict[str, Any]:
    details = {key: value for key, value in (status.metadata or {}).items() if key != "job_id"}
    return {"status": status.status.value, "progress": status.progress, **details}
