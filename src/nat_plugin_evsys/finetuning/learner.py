"""One policy under training in a run: what its rollouts come to, its jobs, its books and its checkpoints."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nat.data_models.finetuning import TrainingJobStatus, TrajectoryCollection

from nat_plugin_evsys.calls import CallFate, DropReason, PromptHistory
from nat_plugin_evsys.finetuning.bookkeeping import RunBooks
from nat_plugin_evsys.finetuning.collapse import collapse_of, rate_after, reload_best
from nat_plugin_evsys.finetuning.curriculum import Curriculum
from nat_plugin_evsys.finetuning.epoch_checkpoints import EpochCheckpoints
from nat_plugin_evsys.finetuning.rollout_keeper import RolloutKeeper
from nat_plugin_evsys.finetuning.run_pages import RunPages
from nat_plugin_evsys.finetuning.watch import Watch
from nat_plugin_evsys.finetuning.workflow.policy_rollouts import PolicyRollouts, RolloutReport
from nat_plugin_evsys.policy.policy import Policy
from nat_plugin_evsys.report.findings import Finding
from nat_plugin_evsys.report.metrics_log import RELOADED
from nat_plugin_evsys.report.trackers.tracking import Tracking
from nat_plugin_evsys.rollouts.trajectories import num_calls
from nat_plugin_evsys.runs.rollouts import Collection
from nat_plugin_evsys.runs.state import CheckpointRecord

if TYPE_CHECKING:
    from nat.data_models.finetuning import TrainingJobRef

    from nat_plugin_evsys.config import EvsysTrainerConfig
    from nat_plugin_evsys.finetuning.trainer_adapter import EvsysTrainerAdapter

logger = logging.getLogger(__name__)


class Learner:
    """A policy under training. A run has one for each; the state of the first one commits the run.

    Args:
        rollouts: the run's rollouts as this policy sees them.
        agent: the workflow's type.

    Attributes:
        held_back: rollout id -> why the curriculum held it back in the last epoch.
    """

    def __init__(
        self,
        rollouts: PolicyRollouts,
        adapter: EvsysTrainerAdapter,
        books: RunBooks,
        curriculum: Curriculum,
        tracking: Tracking,
        config: EvsysTrainerConfig,
        *,
        agent: str,
    ) -> None:
        self.rollouts = rollouts
        self.adapter = adapter
        self.books = books
        self.curriculum = curriculum
        self.tracking = tracking
        self.pages = RunPages(books.run_dir, books.metrics)
        self.checkpoints = EpochCheckpoints(self.policy, books, config.keep_checkpoints)
        self.held_back: Mapping[str, DropReason] = {}
        self._watch = Watch(books.metrics, can_reload=config.on_collapse != "continue")
        self._keeper = RolloutKeeper(
            books.run_dir.rollouts,
            lambda token_id: self.policy.renderer.token_bytes(token_id),
            rows=config.keep_rollouts,
            session=books.run_dir.path.name,
            agent=agent,
            model=self.policy.config.base_model,
        )

    @property
    def name(self) -> str:
        """What the YAML calls the policy."""
        return self.rollouts.name

    @property
    def policy(self) -> Policy:
        """The policy itself."""
        return self.rollouts.policy

    @property
    def report(self) -> RolloutReport:
        """What the epoch's rollouts came to."""
        assert self.rollouts.report is not None, "rollouts come first"
        return self.rollouts.report

    def resume(self) -> None:
        """Continue where the committed state is; its weights have been loaded."""
        self.curriculum.load_state(self.books.state.curriculum)
        self.adapter.scale_rate(rate_after(self.books.metrics.rows()))
        self.adapter.resume_after(self._jobs())

    @property
    def steps_taken(self) -> int:
        """Optimizer steps of the run's finished epochs; the policy's version falls when a checkpoint is loaded."""
        return sum(int((job.get("metrics") or {}).get("steps", 0)) for job in self._jobs())

    def _jobs(self) -> list[dict[str, Any]]:
        """What metrics.jsonl has of the jobs of the finished epochs."""
        return [row["job"] for row in self.books.metrics.epochs() if row.get("job")]

    # -- an epoch, counted from 0 -------------------------------------------------------------------------------------

    def select(self, collection: TrajectoryCollection, epoch: int) -> TrajectoryCollection:
        """Drop what the curriculum holds back and count it under the curriculum's reasons."""
        selection = self.curriculum.select(collection, epoch)
        self.held_back = selection.reasons
        self.books.count_dropped(selection.dropped_calls, selection.dropped_trajectories)
        return selection.collection

    async def submit(self, run_id: str, epoch: int) -> TrainingJobRef | None:
        """Start the job on the epoch's rollouts; None when no trajectory is left to train on."""
        collection = self.select(TrajectoryCollection(trajectories=self.rollouts.groups, run_id=run_id), epoch)
        if not collection.trajectories:
            logger.warning("epoch %d: `%s` has no trajectory to train on and is unchanged", epoch + 1, self.name)
            return None
        return await self.adapter.submit(collection, epoch=epoch)

    def drop_groups(self) -> None:
        """Count the trajectories of rollouts that end the run, since all of them failed and earned the same."""
        trajectories = [trajectory for group in self.rollouts.groups for trajectory in group]
        reason = DropReason.ZERO_VARIANCE_GROUP
        if trajectories:
            self.books.count_dropped({reason: sum(map(num_calls, trajectories))}, {reason: len(trajectories)})

    async def keep(self, collection: Collection, fates: Mapping[Any, CallFate] | None = None) -> None:
        """Write the last rollouts, and what training did with their calls."""
        held_back = {} if fates is None else self.held_back
        await self._keeper.keep(collection, self.rollouts.take_attempts(), fates=fates, held_back=held_back)

    async def keep_epoch(self, epoch: int, ref: TrainingJobRef | None) -> None:
        """Write the epoch's rollouts, once its job has ended."""
        fates = {} if ref is None else self.adapter.take_fates(ref)
        fates |= {key: CallFate(reason) for key, reason in self.report.left_out.items()}
        await self.keep(Collection("epoch", epoch + 1), fates)

    def row(
        self, epoch: int, status: TrainingJobStatus | None, rollout_seconds: float, seconds: float
    ) -> dict[str, Any]:
        """The epoch's row of metrics.jsonl, before it was looked at.

        Args:
            seconds: that training took.
        """
        if status is not None:
            self.books.count_job(status)
        return {
            **_row(self.report, status, rollout_seconds, seconds),
            "policy_version": self.policy.version,
            **({"curriculum_percentile": self.curriculum.percentile(epoch)} if self.curriculum.config.enabled else {}),
        }

    def look(self, epoch: int, row: dict[str, Any], *, validated: bool) -> list[Finding]:
        """Add to an epoch's row what the watch has to say; returns the findings that are new."""
        heldout = self.rollouts.evaluation if validated else None
        columns, found = self._watch.look(epoch + 1, self.report, row["job"], heldout)
        row |= columns
        return found

    async def reload_if_collapsed(self, row: dict[str, Any], measured: float | None) -> CheckpointRecord | None:
        """Load the best checkpoint if the row reports a collapse; returns which, and adds it to the row.

        Args:
            measured: held-out reward after the epoch. Where it is above that of every checkpoint, the epoch's training
                has mended what its rollouts showed, and nothing is loaded.
        """
        state = self.books.state
        best = await reload_best(self.checkpoints, state, measured) if collapse_of(row) is not None else None
        if best is not None:
            row[RELOADED] = best.name
            if state.heldout_reward_after is not None:  # what the collapsed policy earned
                state.heldout_reward_after = best.reward
        return best


def _row(
    report: RolloutReport, status: TrainingJobStatus | None, rollout_seconds: float, training_seconds: float
) -> dict[str, Any]:
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
        "sampled_tokens": report.sampled_tokens,
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
