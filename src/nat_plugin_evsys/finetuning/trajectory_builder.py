"""Rollouts of the workflow -> trajectories, one group per dataset row."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nat.data_models.config import Config
from nat.data_models.dataset_handler import EvalDatasetBaseConfig
from nat.data_models.finetuning import FinetuneConfig, FinetuneRunConfig, Trajectory, TrajectoryCollection
from nat.finetuning.interfaces.trajectory_builder import TrajectoryBuilder

from nat_plugin_evsys.calls import CallKey, CallTally, DropReason, PromptHistory, RunKind
from nat_plugin_evsys.config import EvsysPolicyConfig, EvsysTrajectoryBuilderConfig
from nat_plugin_evsys.errors import ConfigError
from nat_plugin_evsys.finetuning.checks.batch_check import check_batch
from nat_plugin_evsys.finetuning.checks.datasets import check_dataset, dataset_of
from nat_plugin_evsys.finetuning.curriculum import ROLLOUT_ID_KEY, ROW_ID_KEY
from nat_plugin_evsys.finetuning.preflight import check_policy, check_run, resolve_config
from nat_plugin_evsys.finetuning.replies import reply_of
from nat_plugin_evsys.finetuning.telemetry import RunExporters
from nat_plugin_evsys.finetuning.workflow.evaluation import evaluate_policy
from nat_plugin_evsys.finetuning.workflow.sessions import Rollouts
from nat_plugin_evsys.json_lines import append_json_lines
from nat_plugin_evsys.policy.policy import Policy
from nat_plugin_evsys.report.replies import Reply
from nat_plugin_evsys.rollouts.attempts import Attempt, rows_without_signal, with_replacements
from nat_plugin_evsys.rollouts.targets import targeted
from nat_plugin_evsys.rollouts.trajectories import build_trajectory

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class RolloutReport:
    """The result of one evaluation run of the workflow.

    Attributes:
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
        extra_rollouts: attempts that dynamic sampling made.
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
    malformed_calls: int = 0
    drift: float | None = None

    @property
    def mean_reward(self) -> float:
        """Mean over the scored attempts."""
        return sum(self.rewards) / len(self.rewards) if self.rewards else float("nan")


class EvsysTrajectoryBuilder(TrajectoryBuilder):
    """NAT's TrajectoryBuilder on recorded calls."""

    def __init__(
        self, trajectory_builder_config: EvsysTrajectoryBuilderConfig, exporters: RunExporters | None = None
    ) -> None:
        super().__init__(trajectory_builder_config)
        self._exporters = exporters or RunExporters({})
        self.config = trajectory_builder_config
        self.report: RolloutReport | None = None
        self.on_rollout: Callable[[int, int], None] | None = None
        self._attempts: list[Attempt] = []
        self._any_succeeded = False
        self._runs: dict[str, tuple[asyncio.Task[list[Attempt]], Rollouts]] = {}
        self._nat_config: Config | None = None
        self._policy_name = ""
        self._policy_config: EvsysPolicyConfig | None = None

    async def initialize(self, run_config: FinetuneConfig) -> None:
        """Check the whole configuration; nothing is loaded.

        Raises:
            ConfigError, DataError: see ``preflight``.
        """
        await super().initialize(run_config)
        self._nat_config = resolve_config(run_config.run_configuration)
        check_run(self._nat_config, run_config)
        self._policy_name, self._policy_config, _ = check_policy(self._nat_config, run_config)

    @property
    def policy(self) -> Policy:
        """The policy that makes the rollouts."""
        if self._policy_config is None:
            raise ConfigError("the trajectory builder is not initialized; await initialize() first")
        return Policy.of(self._policy_config)

    async def start_run(self, run_id: str, meta: dict[str, Any] | None = None) -> None:
        """Start the rollouts of one epoch in the background. ``on_rollout`` is called for each once they are awaited.

        Args:
            run_id: unique id of this collection of rollouts.
            meta: ``epoch`` names the rollouts (and so their seeds).

        Raises:
            ValueError: this run id is in use.
        """
        if run_id in self._runs:
            raise ValueError(f"run `{run_id}` has already been started; finalize it first")
        rollouts = self._rollouts(f"epoch-{int((meta or {}).get('epoch', 0)):04d}", "rollout")
        self._runs[run_id] = asyncio.create_task(self._roll_out_groups(rollouts), name=f"rollouts-{run_id}"), rollouts

    def is_started(self, run_id: str) -> bool:
        """Whether ``start_run`` was called and ``finalize`` has not ended."""
        return run_id in self._runs

    async def finalize(self, run_id: str, meta: dict[str, Any] | None = None) -> TrajectoryCollection:
        """Wait for the rollouts and build one group of trajectories per dataset row; see also ``report``.

        Raises:
            ValueError: unknown run id.
            RolloutsFailedError: no rollout has both a reward and a call.
        """
        if run_id not in self._runs:
            raise ValueError(f"run `{run_id}` is unknown; known: {sorted(self._runs)}; call start_run first")
        task, rollouts = self._runs[run_id]
        rollouts.on_done = self.on_rollout
        try:
            self._attempts = await task
        finally:
            self._runs.pop(run_id, None)
        self._check(rollouts)
        groups, self.report = self._build(self._attempts)
        return TrajectoryCollection(trajectories=groups, run_id=run_id)

    async def evaluate(
        self, name: str, dataset: EvalDatasetBaseConfig | None, config: Config | None = None
    ) -> RolloutReport:
        """Score the policy once on each row of a dataset, without training on it.

        Args:
            name: names the evaluation (and so its seeds).
            dataset: default is the run's own.
            config: another NAT configuration, as `--validation_config_file` gives.

        Raises:
            RolloutsFailedError: no rollout has both a reward and a call.
        """
        check_dataset(config or self._config, dataset or self._dataset, what=name)
        rollouts = self._rollouts(name, "evaluation")
        rollouts.on_done = self.on_rollout
        self._attempts = await self._roll_out(rollouts, 1, dataset=dataset, config=config)
        self._check(rollouts)
        report = RolloutReport()
        for attempt in self._attempts:
            self._account(report, attempt)
            report.tally.drop(DropReason.VALIDATION, len(attempt.calls))
        return report

    def take_attempts(self) -> list[Attempt]:
        """Return the attempts of the last ``finalize`` or ``evaluate``, scored or not, and forget them."""
        attempts, self._attempts = self._attempts, []
        return attempts

    async def cancel(self) -> None:
        """Stop rollouts in flight, and wait until the others are exported."""
        tasks = [task for task, _ in self._runs.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._runs.clear()
        await self._exporters.drain()

    def log_progress(self, run_id: str, metrics: dict[str, Any], output_dir: str | None = None) -> None:
        """Append a JSON line to ``trajectory_builder.jsonl`` in ``output_dir`` (default: finetuning.output_dir)."""
        path = Path(output_dir or self.run_config.output_dir) / "trajectory_builder.jsonl"
        append_json_lines(path, [{"run_id": run_id, **metrics}])

    def _check(self, rollouts: Rollouts) -> None:
        strays = self.policy.recorder.totals.unattributed - rollouts.unattributed_before
        self._any_succeeded |= any(attempt.error is None for attempt in self._attempts)
        all_may_fail = self._any_succeeded or rollouts.kind == "evaluation"
        check_batch(self._attempts, self._policy_name, unattributed=strays, all_may_fail=all_may_fail)

    @property
    def _config(self) -> Config:
        if self._nat_config is None:
            raise ConfigError("the trajectory builder is not initialized; await initialize() first")
        return self._nat_config

    @property
    def _dataset(self) -> EvalDatasetBaseConfig:
        return dataset_of(self._config, self._run_configuration.dataset)

    def _rollouts(self, name: str, kind: RunKind) -> Rollouts:
        run = self._run_configuration
        return Rollouts(
            name=name,
            kind=kind,
            seed=self.policy.config.seed,
            recorder=self.policy.recorder,
            exporters=self._exporters,
            result_json_path=run.result_json_path,
            timeout=self.config.rollout_timeout,
            unattributed_before=self.policy.recorder.totals.unattributed,
        )

    @property
    def _run_configuration(self) -> FinetuneRunConfig:
        run = self.run_config.run_configuration
        if run is None:
            raise ConfigError("finetuning.run_configuration must be set; use `nat finetune`")
        return run

    async def _roll_out_groups(self, rollouts: Rollouts) -> list[Attempt]:
        """An epoch's rollouts, and those that replace groups without a signal."""
        reps = self.config.num_generations
        attempts = await self._roll_out(rollouts, reps)
        for extra_round in range(1, self.config.dynamic_sampling + 1):
            rows = rows_without_signal(attempts)
            if not rows:
                break
            attempts = with_replacements(attempts, await self._roll_out(rollouts, reps, rows=rows), extra_round)
        return attempts

    async def _roll_out(
        self,
        rollouts: Rollouts,
        reps: int,
        *,
        rows: Collection[str] | None = None,
        dataset: EvalDatasetBaseConfig | None = None,
        config: Config | None = None,
    ) -> list[Attempt]:
        reward = self.run_config.reward_function
        if reward is None:
            raise ConfigError("finetuning.reward_function must be set; use `nat finetune`")
        self.policy.endpoint.attribute_calls()
        return await evaluate_policy(
            config or self._config,
            rollouts,
            reward_name=reward.name,
            dataset=dataset or self._dataset,
            reps=reps,
            max_concurrency=self.config.max_concurrency,
            evaluator_timeout=self.config.evaluator_timeout,
            rows=rows,
        )

    def _build(self, attempts: list[Attempt]) -> tuple[list[list[Trajectory]], RolloutReport]:
        report = RolloutReport()
        groups: dict[str, list[Trajectory]] = {}
        for attempt in attempts:
            self._account(report, attempt)
            group = groups.setdefault(attempt.row_id, [])
            if (reason := attempt.untrainable) is not None:
                report.lost[reason] += 1
                report.tally.drop(reason, len(attempt.calls))
            else:
                assert attempt.reward is not None
                calls, step_rewards, others = targeted(attempt, self.run_config.target_functions)
                report.left_out |= dict.fromkeys((call.key for call in others), DropReason.NOT_TARGETED)
                report.tally.drop(DropReason.NOT_TARGETED, len(others))
                if not calls:
                    report.lost[DropReason.NOT_TARGETED] += 1
                    continue
                metadata = {ROW_ID_KEY: attempt.row_id, ROLLOUT_ID_KEY: attempt.run_id, "error": attempt.error}
                group.append(build_trajectory(calls, attempt.reward, metadata, step_rewards))
                report.staleness.update(self.policy.version - call.policy_version for call in calls)
                report.prompts.update(call.history for call in calls)
                report.malformed_calls += sum(call.malformed_calls for call in calls)
        return [group for group in groups.values() if group], report

    @staticmethod
    def _account(report: RolloutReport, attempt: Attempt) -> None:
        report.tally.calls += len(attempt.calls)
        if attempt.round:
            report.extra_rollouts += 1
            return
        report.replies.append(reply_of(attempt))
        if attempt.reward is not None:
            report.rewards.append(attempt.reward)
        if attempt.error is not None:
            reason = attempt.lost or attempt.cause or DropReason.WORKFLOW_ERROR
            report.failed_rollouts += 1
            report.failures[reason] += 1
            report.errors.setdefault(reason, attempt.error)
