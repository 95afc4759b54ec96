"""Rollouts as a policy under training sees them: its own calls, its own reward, and what they come to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

from nat.data_models.finetuning import Trajectory

from nat_plugin_evsys.calls import CallKey, CallTally, DropReason, PromptHistory
from nat_plugin_evsys.finetuning.checks.trained_policies import TrainedPolicy
from nat_plugin_evsys.finetuning.curriculum import ROLLOUT_ID_KEY, ROW_ID_KEY
from nat_plugin_evsys.finetuning.replies import reply_of
from nat_plugin_evsys.policy.policy import Policy
from nat_plugin_evsys.report.replies import Reply
from nat_plugin_evsys.rollouts.attempts import Attempt
from nat_plugin_evsys.rollouts.targets import targeted
from nat_plugin_evsys.rollouts.trajectories import build_trajectory


@dataclass(slots=True)
class RolloutReport:
    """The result of one evaluation run of the workflow.

    Attributes:
        epochs_per_pass: epochs that visit every row of the dataset once.
        rewards: reward of every scored attempt; without those of dynamic sampling, which tries the rows that the policy
            always or never gets right more often than the others.
        tally: calls made, and those already dropped; what is left is in the trajectories.
        lost: trajectories without a reward or without calls, by reason.
        failures: rollouts that failed, by reason.
        errors: first error text seen for each kind of failed rollout.
        left_out: why calls of rewarded attempts are in no trajectory.
        staleness: calls of the trajectories by how many optimizer steps old they were when these were built.
        prompts: calls of the trajectories by how their prompt holds the turn before it.
        replies: what was said in every attempt, scored or not; again without those of dynamic sampling.
        extra_rollouts: attempts that dynamic sampling made; ``extra_errors``: what those that failed raised.
        sampled_tokens: tokens that the policy sampled in all attempts.
        malformed_calls: what looked like a tool call in them, could not be read as one, and stayed text.
        drift: share of recorded replies that are other tokens as text than were sampled; None where that is unknown.
    """

    rewards: list[float] = field(default_factory=list)
    tally: CallTally = field(default_factory=CallTally)
    lost: Counter[DropReason] = field(default_factory=Counter)
    failed_rollouts: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    errors: dict[str, str] = field(default_factory=dict)
    left_out: dict[CallKey, DropReason] = field(default_factory=dict)
    staleness: Counter[int] = field(default_factory=Counter)
    replies: list[Reply] = field(default_factory=list)
    prompts: Counter[PromptHistory] = field(default_factory=Counter)
    extra_rollouts: int = 0
    extra_errors: list[str] = field(default_factory=list)
    sampled_tokens: int = 0
    malformed_calls: int = 0
    drift: float | None = None
    epochs_per_pass: int = 1

    @property
    def mean_reward(self) -> float:
        """Mean over the scored attempts."""
        return sum(self.rewards) / len(self.rewards) if self.rewards else float("nan")

    def account(self, attempt: Attempt) -> None:
        """Count an attempt, its reward or its failure."""
        self.tally.calls += len(attempt.calls)
        self.sampled_tokens += sum(len(call.output_ids) for call in attempt.calls)
        if attempt.round:
            self.extra_rollouts += 1
            self.extra_errors += [] if attempt.error is None else [attempt.error]
            return
        self.replies.append(reply_of(attempt))
        if attempt.reward is not None:
            self.rewards.append(attempt.reward)
        if attempt.error is not None:
            reason = attempt.lost or attempt.cause or DropReason.WORKFLOW_ERROR
            self.failed_rollouts += 1
            self.failures[reason] += 1
            self.errors.setdefault(reason, attempt.error)


class PolicyRollouts:
    """The rollouts of one policy under training.

    Attributes:
        name: what ``llms:`` calls the policy.
        reward: the evaluator that rewards it.
        discount: see the adapter's setting.
        attempts: those of the last rollouts, scored or not, until they are taken.
        report: of the last rollouts to train on, and ``groups``: their trajectories, one list per dataset row.
        evaluation: of the last rollouts to measure the policy.
    """

    def __init__(self, trained: TrainedPolicy) -> None:
        self.name = trained.name
        self.reward = trained.reward
        self.discount = trained.adapter.discount
        self._config = trained.policy
        self.attempts: list[Attempt] = []
        self.report: RolloutReport | None = None
        self.groups: list[list[Trajectory]] = []
        self.evaluation: RolloutReport | None = None

    @property
    def policy(self) -> Policy:
        """The policy itself."""
        return Policy.of(self._config)

    def take_attempts(self) -> list[Attempt]:
        """Return the attempts of the last rollouts, and forget them."""
        attempts, self.attempts = self.attempts, []
        return attempts

    def evaluated(self) -> RolloutReport:
        """Account for attempts that measured the policy."""
        report = self.evaluation = RolloutReport()
        for attempt in self.attempts:
            report.account(attempt)
            report.tally.drop(DropReason.VALIDATION, len(attempt.calls))
        return report

    def build(self, target_functions: Collection[str]) -> tuple[list[list[Trajectory]], RolloutReport]:
        """The trajectories of attempts to train on, and what became of the others.

        Args:
            target_functions: those whose calls are trained on; see ``targeted``.
        """
        report, version = RolloutReport(), self.policy.version
        groups: dict[str, list[Trajectory]] = {}
        for attempt in self.attempts:
            report.account(attempt)
            group = groups.setdefault(attempt.row_id, [])
            if (reason := attempt.untrainable) is not None:
                report.lost[reason] += 1
                report.tally.drop(reason, len(attempt.calls))
                continue
            assert attempt.reward is not None
            calls, step_rewards, others = targeted(attempt, target_functions)
            report.left_out |= dict.fromkeys((call.key for call in others), DropReason.NOT_TARGETED)
            report.tally.drop(DropReason.NOT_TARGETED, len(others))
            if not calls:
                report.lost[DropReason.NOT_TARGETED] += 1
                continue
            metadata = {ROW_ID_KEY: attempt.row_id, ROLLOUT_ID_KEY: attempt.run_id, "error": attempt.error}
            group.append(build_trajectory(calls, attempt.reward, metadata, step_rewards))
            report.staleness.update(version - call.policy_version for call in calls)
            report.prompts.update(call.history for call in calls)
            report.malformed_calls += sum(call.malformed_calls for call in calls)
        return [group for group in groups.values() if group], report
