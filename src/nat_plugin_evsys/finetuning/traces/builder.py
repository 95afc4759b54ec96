"""Recorded trajectories -> trajectory groups: NAT's TrajectoryBuilder without rollouts.

Held-out rows are still tried by the policy, as in any run. An epoch reads no more than the first one read: records do
not change, so every epoch trains on the same ones.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from typing import TYPE_CHECKING, Any

from nat.data_models.finetuning import FinetuneConfig, Trajectory

from nat_plugin_evsys.calls import DropReason
from nat_plugin_evsys.config import EvsysTraceBuilderConfig, EvsysTrajectoryBuilderConfig
from nat_plugin_evsys.errors import ConfigError, RolloutsFailedError
from nat_plugin_evsys.finetuning.checks.datasets import rows_by_question
from nat_plugin_evsys.finetuning.checks.trained_policies import trained_policies
from nat_plugin_evsys.finetuning.telemetry import RunExporters
from nat_plugin_evsys.finetuning.traces.rewards import answer_to, evaluator_scores, feedback_of
from nat_plugin_evsys.finetuning.traces.selection import best, pairs
from nat_plugin_evsys.finetuning.trajectory_builder import EvsysTrajectoryBuilder
from nat_plugin_evsys.finetuning.workflow.policy_rollouts import PolicyRollouts, RolloutReport
from nat_plugin_evsys.finetuning.workflow.scores import evaluator_problem, number_of
from nat_plugin_evsys.rollouts.attempts import Attempt
from nat_plugin_evsys.rollouts.preferences import PAIRED_CALLS_KEY
from nat_plugin_evsys.rollouts.traces.files import read_records
from nat_plugin_evsys.rollouts.traces.record import Record, question_key
from nat_plugin_evsys.rollouts.traces.to_calls import CallReader
from nat_plugin_evsys.rollouts.trajectories import calls_of

if TYPE_CHECKING:
    from nat_plugin_evsys.finetuning.trainer_adapter import EvsysTrainerAdapter
    from nat_plugin_evsys.finetuning.workflow.sessions import Rollouts

logger = logging.getLogger(__name__)

_WHAT_TO_DO = {
    DropReason.TEXT_ONLY: "set `retokenize: true` on the trainer adapter to train on the tokens of the text, which "
    "`algorithm: sft` and `dpo` can",
    DropReason.PROMPT_UNKNOWN: "write LLM_START steps too: eval.general.output.workflow_output_step_filter: "
    "[LLM_START, LLM_END], or NAT's `file` telemetry exporter; its ATIF has no system prompts",
    DropReason.NO_FEEDBACK: "name the field that has it in `feedback`, and words in `feedback_values`",
}


class EvsysTraceBuilder(EvsysTrajectoryBuilder):
    """Reads the files once, before the model is loaded, and makes calls of them when the first epoch asks for them."""

    samples = False

    def __init__(self, config: EvsysTraceBuilderConfig, exporters: RunExporters | None = None) -> None:
        limits = EvsysTrajectoryBuilderConfig(
            num_generations=1,
            max_concurrency=config.max_concurrency,
            rollout_timeout=config.rollout_timeout,
            evaluator_timeout=config.evaluator_timeout,
        )
        super().__init__(limits, exporters)
        self.traces = config
        self._records: list[Record] = []
        self._recorded: list[Attempt] | None = None
        self._retokenize = False
        self._drift: float | None = None

    async def initialize(self, run_config: FinetuneConfig) -> None:
        """Check the configuration and read the files, so that what is wrong with them is said before the model loads.

        Raises:
            ConfigError, DataError: see ``preflight`` and ``read_records``.
        """
        await super().initialize(run_config)
        self._retokenize = trained_policies(self._config, run_config)[0].adapter.retokenize
        if self.traces.algorithm == "rl" and self._retokenize:
            raise ConfigError(
                "algorithm `rl` weighs replies by the logprobs that they were sampled with, which text does not have; "
                "remove the trainer adapter's retokenize, or choose algorithm: sft or dpo"
            )
        if self.traces.algorithm != "rl" and run_config.curriculum_learning.enabled:
            raise ConfigError(
                f"algorithm `{self.traces.algorithm}` chooses what it trains on; set curriculum_learning.enabled: false"
            )
        self._records = await asyncio.to_thread(self._read)

    def prepare(self, adapter: EvsysTrainerAdapter) -> None:
        """Let the adapter use the algorithm's loss.

        Raises:
            ConfigError: the user chose a loss that is another algorithm's.
        """
        supervised, chosen = self.traces.algorithm == "sft", adapter.config.loss_fn
        if supervised:
            adapter.prefer_loss("cross_entropy", "the traces' best replies are learned")
        elif self.traces.algorithm == "rl":
            adapter.expect_records("algorithm `rl` of evsys_trace_builder")
        if self.traces.algorithm != "dpo" and (adapter.config.loss_fn == "cross_entropy") is not supervised:
            raise ConfigError(
                f"algorithm `{self.traces.algorithm}` does not go with the adapter's loss_fn `{chosen}`; remove loss_fn"
            )

    def _read(self) -> list[Record]:
        structure = self._dataset.structure
        keys = {
            "question": structure.question_key,
            "answer": structure.answer_key,
            "generated_answer": structure.generated_answer_key,
            "intermediate_steps": structure.trajectory_key,
        }
        return read_records(self.traces.files, keys, "trajectory_builders.*.files")

    async def _roll_out_groups(self, rollouts: Rollouts, epoch: int) -> list[list[Attempt]]:
        """The records as attempts, with their rewards."""
        if self._recorded is None:
            self._recorded = await self._attempts_of(self._records, rollouts)
            self._records = []
        return [list(self._recorded)]

    async def _attempts_of(self, records: list[Record], rollouts: Rollouts) -> list[Attempt]:
        await self.policy.ensure_loaded()
        reader = CallReader(
            self.policy.renderer,
            self._retokenize,
            self.traces.temperature,
            frozenset({self._own.name, self.policy.config.base_model}),
            needs_logprobs=self.traces.algorithm == "rl",
        )
        rows = rows_by_question(self._dataset)
        scores = await self._scores(records, rows, rollouts)
        attempts: list[Attempt] = []
        numbers: Counter[str] = Counter()
        for at, (record, score) in enumerate(zip(records, scores, strict=True)):
            run_id = f"record-{at}"
            calls, lost, error = await asyncio.to_thread(reader.calls, record, run_id)
            reward, unscored, why = self._reward(score)
            lost, error = (lost, error) if lost is not None else (unscored, why)
            question = question_key(record.question)
            row = str(rows.get(question, {}).get(self._dataset.id_key, question))
            attempts.append(
                Attempt(
                    row_id=row,
                    number=numbers[row],
                    run_id=run_id,
                    calls=calls,
                    reward=reward if lost is None else None,
                    lost=lost,
                    error=f"{record.name}: {error}" if error else None,
                    question=record.question,
                    expected=answer_to(record, rows),
                    output=record.output,
                    entry=rows.get(question),
                )
            )
            numbers[row] += 1
        self._drift = reader.drift.share
        logger.warning("%s", _what_was_read(attempts, reader))
        return attempts

    async def _scores(self, records: list[Record], rows: Any, rollouts: Rollouts) -> list[Any]:
        path, values = self.traces.feedback, self.traces.feedback_values
        if path is not None:
            return [feedback_of(record, path, values) for record in records]
        return await evaluator_scores(
            records,
            rows,
            rollouts,
            config=self._config,
            reward_name=self._own.reward,
            evaluator_timeout=self.traces.evaluator_timeout,
        )

    def _reward(self, score: Any) -> tuple[float | None, DropReason | None, str | None]:
        """The reward, or why there is none."""
        if self.traces.feedback is not None:
            number = number_of(score)
            missing = None if number is not None else DropReason.NO_FEEDBACK
            return number, missing, None if score is None or missing is None else f"its feedback is {score!r}"
        problem = evaluator_problem(score)
        if problem is not None:
            return None, DropReason.EVALUATOR_ERROR, problem
        return number_of(score.score), None, None

    def _check(self, rollouts: Rollouts) -> None:
        if rollouts.kind == "evaluation":
            super()._check(rollouts)
        elif all(attempt.untrainable for attempt in self._own.attempts):
            count = len(self._own.attempts)
            raise RolloutsFailedError(f"none of the {count} records can be trained on. {self._advice()}")

    def _advice(self) -> str:
        """The reasons with their counts, the first cause, and what to type."""
        reasons = Counter(attempt.untrainable for attempt in self._own.attempts if attempt.untrainable)
        said = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
        first = next((attempt.error for attempt in self._own.attempts if attempt.error), None)
        advice = next((_WHAT_TO_DO[reason] for reason, _ in reasons.most_common() if reason in _WHAT_TO_DO), None)
        return ". ".join(filter(None, [said, first, advice and advice[0].upper() + advice[1:]]))

    def _build(self, rollouts: PolicyRollouts) -> tuple[list[list[Trajectory]], RolloutReport]:
        groups, report = super()._build(rollouts)
        report.drift = self._drift
        report.staleness.clear()  # no version of the policy sampled a record
        match self.traces.algorithm:
            case "rl":
                return groups, report
            case "sft":
                chosen = best(groups, self.traces.min_reward, self.traces.top_share)
                kept = {call.key for group in chosen for each in group for call in calls_of(each)}
                reason = DropReason.NOT_SELECTED
            case "dpo":
                chosen = pairs(groups)
                named = [(each.metadata or {})[PAIRED_CALLS_KEY] for group in chosen for each in group]
                kept = {(str(name), int(index)) for names in named for name, index in names}
                reason = DropReason.NOT_PAIRED
        for trajectory in (each for group in groups for each in group):
            own = [call.key for call in calls_of(trajectory)]
            others = [key for key in own if key not in kept]
            report.left_out |= dict.fromkeys(others, reason)
            report.tally.drop(reason, len(others))
            report.lost[reason] += len(others) == len(own)
        return [group for group in chosen if group], report


def _what_was_read(attempts: list[Attempt], reader: CallReader) -> str:
    reasons = Counter(attempt.untrainable for attempt in attempts if attempt.untrainable)
    good = len(attempts) - reasons.total()
    calls = sum(len(attempt.calls) for attempt in attempts)
    again = sum(call.retokenized for attempt in attempts for call in attempt.calls)
    dropped = "".join(f", {reason} {count}" for reason, count in reasons.most_common())
    prompts = reader.prompt_drift
    return (
        f"{len(attempts)} records: {good} with a reward and calls{dropped}. {calls} calls, {again} of them tokenised "
        f"from their text; {reader.drift}"
        + (f"; {prompts.drifted} of {prompts.compared} prompts have another length" if prompts.compared else "")
    )
