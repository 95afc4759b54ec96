"""Rollouts of the workflow -> trajectories, one group per dataset row."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nat.data_models.config import Config
from nat.data_models.dataset_handler import EvalDatasetBaseConfig
from nat.data_models.finetuning import FinetuneConfig, FinetuneRunConfig, Trajectory, TrajectoryCollection
from nat.finetuning.interfaces.trajectory_builder import TrajectoryBuilder

from nat_plugin_evsys.calls import RunKind
from nat_plugin_evsys.config import EvsysTrajectoryBuilderConfig
from nat_plugin_evsys.errors import ConfigError
from nat_plugin_evsys.finetuning.checks.batch_check import check_batch
from nat_plugin_evsys.finetuning.checks.datasets import check_dataset, dataset_of
from nat_plugin_evsys.finetuning.checks.trained_policies import trained_policies
from nat_plugin_evsys.finetuning.preflight import check_run, resolve_config
from nat_plugin_evsys.finetuning.telemetry import RunExporters
from nat_plugin_evsys.finetuning.workflow.dataset_rows import ChosenRows, DatasetRows
from nat_plugin_evsys.finetuning.workflow.evaluation import evaluate_policy
from nat_plugin_evsys.finetuning.workflow.policy_rollouts import PolicyRollouts, RolloutReport
from nat_plugin_evsys.finetuning.workflow.sessions import Recording, Rollouts
from nat_plugin_evsys.json_lines import append_json_lines
from nat_plugin_evsys.policy.policy import Policy
from nat_plugin_evsys.rollouts.attempts import Attempt, rows_without_signal, with_replacements
from nat_plugin_evsys.rollouts.row_batches import RowBatches
from nat_plugin_evsys.rollouts.targets import only_targeted

logger = logging.getLogger(__name__)


class EvsysTrajectoryBuilder(TrajectoryBuilder):
    """NAT's TrajectoryBuilder on recorded calls.

    Attributes:
        samples: whether the rewards are of what the policies under training sample.
        by_policy: the rollouts as each policy under training sees them; the first is that of NAT's trainer adapter,
            which NAT's own methods are about.
        any_succeeded: whether a rollout of the run has ended without an error; if none has, only failures end it.
    """

    samples = True

    def __init__(
        self, trajectory_builder_config: EvsysTrajectoryBuilderConfig, exporters: RunExporters | None = None
    ) -> None:
        super().__init__(trajectory_builder_config)
        self._exporters = exporters or RunExporters({})
        self.config = trajectory_builder_config
        self.by_policy: list[PolicyRollouts] = []
        self.on_rollout: Callable[[int, int], None] | None = None
        self.any_succeeded = False
        self._epochs_per_pass = 1
        self._rows = DatasetRows()
        self._runs: dict[str, tuple[asyncio.Task[list[list[Attempt]]], Rollouts]] = {}
        self._nat_config: Config | None = None

    async def initialize(self, run_config: FinetuneConfig) -> None:
        """Check the whole configuration; nothing is loaded.

        Raises:
            ConfigError, DataError: see ``preflight``.
        """
        await super().initialize(run_config)
        self._nat_config = resolve_config(run_config.run_configuration)
        check_run(self._nat_config, run_config)
        self.by_policy = [PolicyRollouts(each) for each in trained_policies(self._nat_config, run_config)]

    @property
    def policy(self) -> Policy:
        """The policy that makes the rollouts."""
        return self._own.policy

    @property
    def report(self) -> RolloutReport | None:
        """What the last ``finalize`` came to."""
        return self._own.report

    @property
    def _own(self) -> PolicyRollouts:
        if not self.by_policy:
            raise ConfigError("the trajectory builder is not initialized; await initialize() first")
        return self.by_policy[0]

    async def start_run(self, run_id: str, meta: dict[str, Any] | None = None) -> None:
        """Start the rollouts of one epoch in the background. ``on_rollout`` is called for each once they are awaited.

        Args:
            run_id: unique id of this collection of rollouts.
            meta: ``epoch``, from 0, names the rollouts (and so their seeds), and decides their rows.

        Raises:
            ValueError: this run id is in use.
        """
        if run_id in self._runs:
            raise ValueError(f"run `{run_id}` has already been started; finalize it first")
        epoch = int((meta or {}).get("epoch", 0))
        rollouts = self._rollouts(f"epoch-{epoch:04d}", "rollout")
        task = asyncio.create_task(self._roll_out_groups(rollouts, epoch), name=f"rollouts-{run_id}")
        self._runs[run_id] = task, rollouts

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
            self._take(await task)
        finally:
            self._runs.pop(run_id, None)
        for each in self.by_policy:
            each.groups, each.report = self._build(each)
        self._check(rollouts)
        return TrajectoryCollection(trajectories=self._own.groups, run_id=run_id)

    async def evaluate(
        self, name: str, dataset: EvalDatasetBaseConfig | None, config: Config | None = None
    ) -> RolloutReport:
        """Score the policies once on each row of a dataset, without training on it.

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
        self._take(await self._roll_out(rollouts, 1, dataset=dataset, config=config))
        own, *_ = [each.evaluated() for each in self.by_policy]
        self._check(rollouts)
        return own

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

    def _take(self, by_policy: list[list[Attempt]]) -> None:
        for each, attempts in zip(self.by_policy, by_policy, strict=True):
            each.attempts = attempts

    def _check(self, rollouts: Rollouts) -> None:
        strays = self._unattributed() - rollouts.unattributed_before
        self.any_succeeded |= any(attempt.error is None for attempt in self._own.attempts)
        all_may_fail = self.any_succeeded or rollouts.kind == "evaluation"
        any_called = any(attempt.calls for each in self.by_policy for attempt in each.attempts)
        for each in self.by_policy:
            uncalled = not any(attempt.calls for attempt in each.attempts)
            if any_called and uncalled and not all(attempt.lost for attempt in each.attempts):
                logger.warning("none of %d rollouts called the policy `%s`", len(each.attempts), each.name)
                continue
            check_batch(each.attempts, rollouts.name, each.name, unattributed=strays, all_may_fail=all_may_fail)

    def _unattributed(self) -> int:
        return sum(each.policy.recorder.totals.unattributed for each in self.by_policy)

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
        own, *others = (Recording(each.policy.recorder, each.policy.config.seed) for each in self.by_policy)
        return Rollouts(
            name=name,
            kind=kind,
            seed=own.seed,
            recorder=own.recorder,
            exporters=self._exporters,
            others=others,
            result_json_path=run.result_json_path,
            timeout=self.config.rollout_timeout,
            unattributed_before=self._unattributed(),
        )

    @property
    def _run_configuration(self) -> FinetuneRunConfig:
        run = self.run_config.run_configuration
        if run is None:
            raise ConfigError("finetuning.run_configuration must be set; use `nat finetune`")
        return run

    async def _roll_out_groups(self, rollouts: Rollouts, epoch: int) -> list[list[Attempt]]:
        """An epoch's rollouts for each policy, and those that replace groups without a signal."""
        reps = self.config.num_generations
        batches = RowBatches(self.config.rows_per_epoch, rollouts.seed)

        def of_epoch(row_ids: Sequence[str]) -> list[str]:
            self._epochs_per_pass = batches.epochs_per_pass(len(row_ids))
            return batches.rows(row_ids, epoch)

        chosen = None if batches.size is None else await self._rows.choose(self._dataset, of_epoch)
        by_policy = await self._roll_out(rollouts, reps, rows=chosen)
        for extra_round in range(1, self.config.dynamic_sampling + 1):  # refused with several policies
            [attempts] = by_policy
            trained = [only_targeted(attempt, self.run_config.target_functions) for attempt in attempts]
            rows = rows_without_signal(trained, self._own.discount)
            if not rows:
                break
            chosen = await self._rows.choose(self._dataset, set(rows).intersection)
            [again] = await self._roll_out(rollouts, reps, rows=chosen)
            by_policy = [with_replacements(attempts, again, extra_round)]
        return by_policy

    async def _roll_out(
        self,
        rollouts: Rollouts,
        reps: int,
        *,
        rows: ChosenRows | None = None,
        dataset: EvalDatasetBaseConfig | None = None,
        config: Config | None = None,
    ) -> list[list[Attempt]]:
        for each in self.by_policy:
            each.policy.endpoint.attribute_calls()
        return await evaluate_policy(
            config or self._config,
            rollouts,
            rewards=[each.reward for each in self.by_policy],
            dataset=dataset or self._dataset,
            reps=reps,
            max_concurrency=self.config.max_concurrency,
            evaluator_timeout=self.config.evaluator_timeout,
            rows=rows,
        )

    def _build(self, rollouts: PolicyRollouts) -> tuple[list[list[Trajectory]], RolloutReport]:
        groups, report = rollouts.build(self.run_config.target_functions)
        report.epochs_per_pass = self._epochs_per_pass
        return groups, report
