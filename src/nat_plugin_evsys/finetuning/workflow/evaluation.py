"""One evaluation run of the workflow with the policy: rollouts, their rewards, and what became of each."""

from __future__ import annotations

import asyncio
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from nat.data_models.evaluate_runtime import EvaluationRunConfig
from nat.plugins.eval.runtime.evaluate import EvaluationRun

from nat_plugin_evsys.calls import DropReason
from nat_plugin_evsys.errors import causes
from nat_plugin_evsys.finetuning.checks.addresses import with_dead_addresses
from nat_plugin_evsys.finetuning.telemetry import without_exporters
from nat_plugin_evsys.finetuning.workflow.limits import bound_items, exits_are_errors
from nat_plugin_evsys.finetuning.workflow.scores import evaluator_problem, number_of
from nat_plugin_evsys.finetuning.workflow.sessions import RecordedSessions, Rollouts
from nat_plugin_evsys.overlapping import entered_once
from nat_plugin_evsys.report.quiet import quiet_tqdm
from nat_plugin_evsys.rollouts.attempts import Attempt

if TYPE_CHECKING:
    from nat.data_models.config import Config
    from nat.data_models.dataset_handler import EvalDatasetBaseConfig
    from nat.data_models.evaluate_config import EvalConfig
    from nat.data_models.evaluator import EvalInputItem
    from nat.runtime.session import SessionManager

    from nat_plugin_evsys.finetuning.workflow.dataset_rows import ChosenRows
    from nat_plugin_evsys.policy.recorder import Recorder

logger = logging.getLogger(__name__)

STEP_REWARDS = "step_rewards"
"""Key of an evaluator's ``reasoning`` (a dict) whose value is a list with a reward for each call of the rollout."""

_ENDING_SECONDS = 10.0
"""How long to wait for requests that the workflow has ended without; what comes later counts as unattributed."""


class PolicyEvaluation(EvaluationRun):
    """NAT's EvaluationRun with recorded sessions. The workflow is built once for all repetitions.

    Args:
        rows: those to run, read already; by default all of the configuration's dataset.
    """

    def __init__(
        self,
        config: EvaluationRunConfig,
        rollouts: Rollouts,
        evaluator_timeout: float,
        rows: ChosenRows | None = None,
    ) -> None:
        self._rows = rows
        super().__init__(config)
        self._rollouts = rollouts
        self._evaluator_timeout = evaluator_timeout

    @property
    def eval_config(self) -> EvalConfig | None:
        """What NAT reads the dataset by. Its builder has the configuration itself, and a loader for the type there."""
        return self._eval_config

    @eval_config.setter
    def eval_config(self, config: EvalConfig | None) -> None:
        if config is not None and self._rows is not None:
            config = config.model_copy(update={"general": config.general.model_copy(update={"dataset": self._rows})})
        self._eval_config = config

    async def run_workflow_local(self, session_manager: SessionManager, http_connection: Any = None) -> None:
        """Run the items through recorded sessions."""
        if self.eval_input is not None:
            self._rollouts.total += len(self.eval_input.eval_input_items)
        recorded: Any = RecordedSessions(session_manager, self._rollouts)
        await super().run_workflow_local(recorded, http_connection=http_connection)

    async def run_evaluators(self, evaluators: dict[str, Any]) -> None:
        """Run the evaluators in bounded time."""
        items = len(self.eval_input.eval_input_items) if self.eval_input else 0
        for evaluator in evaluators.values():
            bound_items(evaluator, self._evaluator_timeout)
        with suppress(TimeoutError):  # then there are no scores, which is an error of the evaluator
            async with asyncio.timeout(self._evaluator_timeout * (items + 1)):
                await super().run_evaluators(evaluators)

    def _on_eval_complete(self, dataset_handler: Any = None) -> None:
        # NAT writes every trajectory as JSON here before it looks whether anybody wants it.
        if self.callback_manager.has_callbacks:
            super()._on_eval_complete(dataset_handler)


async def evaluate_policy(
    config: Config,
    rollouts: Rollouts,
    *,
    rewards: Sequence[str],
    dataset: EvalDatasetBaseConfig,
    reps: int,
    max_concurrency: int | None,
    evaluator_timeout: float,
    rows: ChosenRows | None = None,
) -> list[list[Attempt]]:
    """Run the workflow ``reps`` times on each dataset row and score every attempt.

    Args:
        config: the resolved NAT configuration; it is not changed.
        rewards: the evaluator whose score is the reward, for each policy that ``rollouts`` record.
        dataset: the rows, instead of the configuration's own.
        evaluator_timeout: seconds to score one rollout; an evaluator that scores all at once has as many for each.
        rows: those of ``dataset`` to run; all by default.

    Returns:
        For each policy every attempt with its own calls and reward, scored or not; see ``check_batch``.
    """
    run_config = EvaluationRunConfig(
        config_file=evaluation_config(config, rewards, dataset, max_concurrency),
        reps=reps,
        write_output=False,
    )
    with quiet_tqdm(), quiet_nat(), exits_are_errors():
        output = await PolicyEvaluation(run_config, rollouts, evaluator_timeout, rows).run_and_evaluate()
    scores = {
        (name, str(item.id)): item for name, result in output.evaluation_results for item in result.eval_output_items
    }
    items = output.eval_input.eval_input_items
    run_ids = [run_id for item in items if (run_id := _run_id(item)) is not None]
    for recorder in rollouts.recorders:
        await asyncio.to_thread(recorder.wait_until_answered, run_ids, _ENDING_SECONDS)
    by_item = [
        attempts_of(item, [scores.get((name, str(item.id))) for name in rewards], rollouts, reps) for item in items
    ]
    by_policy = [[attempts[at] for attempts in by_item] for at in range(len(rewards))]
    return [
        await asyncio.to_thread(with_dead_addresses, attempts, config, name)
        for attempts, name in zip(by_policy, rewards, strict=True)
    ]


def evaluation_config(
    config: Config, rewards: Sequence[str], dataset: EvalDatasetBaseConfig, max_concurrency: int | None
) -> Config:
    """A copy of the configuration with only what one evaluation run needs.

    Without the finetuning components (NAT would build and close them each time), without ``run_configuration`` (it
    contains the configuration itself: NAT logs it and ends in a RecursionError), without NAT's own output directory
    (it is wiped at every evaluation), without exporters and log handlers (the run has them), and with the evaluators of
    the rewards alone.
    """
    general = config.eval.general.model_copy(
        update={
            "output": None,
            "profiler": None,
            "dataset": dataset,
            "max_concurrency": max_concurrency or config.eval.general.max_concurrency,
        }
    )
    evaluators = {name: config.eval.evaluators[name] for name in rewards}
    return config.model_copy(
        update={
            "general": without_exporters(config.general),
            "finetuning": config.finetuning.model_copy(update={"run_configuration": None, "enabled": False}),
            "trainers": {},
            "trainer_adapters": {},
            "trajectory_builders": {},
            "eval": config.eval.model_copy(update={"general": general, "evaluators": evaluators}),
        }
    )


def attempts_of(item: EvalInputItem, scores: Sequence[Any], rollouts: Rollouts, reps: int) -> list[Attempt]:
    """The attempt, one of ``reps`` at its row, as each recorded policy made it: its own calls, and its own score."""
    losses = [_loss(_run_id(item), score, rollouts) for score in scores]  # all recorders know the rollout still
    return [
        _attempt(item, score, loss, rollouts, recorder, reps)
        for score, loss, recorder in zip(scores, losses, rollouts.recorders, strict=True)
    ]


def _attempt(
    item: EvalInputItem,
    score: Any,
    loss: tuple[DropReason | None, str | None],
    rollouts: Rollouts,
    recorder: Recorder,
    reps: int,
) -> Attempt:
    run_id = _run_id(item)
    lost, error = loss
    refusals = [] if run_id is None else recorder.refusals(run_id)
    row_id, number = _row_and_attempt(item, reps)
    calls = [] if run_id is None else recorder.close_run(run_id)
    cause = None if run_id not in rollouts.failures else DropReason.WORKFLOW_ERROR
    if refusals and (cause or not calls):
        cause, error = refusals[-1].reason, error or f"the policy refused the call: {refusals[-1].message}"
    steps = None if lost else _step_rewards(score)
    if steps is not None and (problem := _step_problem(steps, len(calls))):
        lost, error, steps = DropReason.EVALUATOR_ERROR, problem, None
    return Attempt(
        row_id=row_id,
        number=number,
        run_id=run_id or "",
        calls=calls,
        reward=number_of(score.score) if lost is None else None,
        lost=lost,
        error=error,
        cause=cause,
        question=item.input_obj,
        expected=item.expected_output_obj,
        entry=_entry(item, row_id),
        output=item.output_obj,
        reasoning=getattr(score, "reasoning", None),
        seconds=rollouts.seconds.get(run_id or ""),
        step_rewards=steps,
    )


def _loss(run_id: str | None, score: Any, rollouts: Rollouts) -> tuple[DropReason | None, str | None]:
    """Why a rollout has no reward, or None, and the error to show (which a rollout with a reward may also have)."""
    if run_id is None:
        return DropReason.INFRASTRUCTURE_ERROR, "NAT recorded no WORKFLOW_START step"
    infrastructure = [failure for recorder in rollouts.recorders for failure in recorder.failures(run_id)]
    failure = rollouts.failures.get(run_id)
    error = None if failure is None else f"{type(failure).__name__}: {failure}"
    if run_id in rollouts.timeouts:
        return DropReason.ROLLOUT_TIMEOUT, f"cut off after {rollouts.timeout} s"
    if infrastructure or _is_connection_error(failure):
        return DropReason.INFRASTRUCTURE_ERROR, str(infrastructure[0]) if infrastructure else error
    problem = evaluator_problem(score)
    return (None, error) if problem is None else (DropReason.EVALUATOR_ERROR, problem)


def _step_rewards(score: Any) -> Any:
    """The evaluator's rewards of the single calls, if any."""
    reasoning = getattr(score, "reasoning", None)
    return reasoning.get(STEP_REWARDS) if isinstance(reasoning, dict) else None


def _step_problem(steps: Any, calls: int) -> str | None:
    """Why these are not valid rewards of single calls, or None."""
    good = isinstance(steps, list) and all(
        isinstance(step, int | float) and not isinstance(step, bool) and math.isfinite(step) for step in steps
    )
    if good and len(steps) == calls:
        return None
    return f"the evaluator's {STEP_REWARDS} are {steps!r}, but the rollout made {calls} calls; give one number for each"


def _row_and_attempt(item: EvalInputItem, reps: int) -> tuple[str, int]:
    """NAT numbers the attempts at a row, if there are several, in the id: ``row_rep3`` is the fourth at ``row``."""
    row_id, suffix, number = str(item.id).rpartition("_rep")
    return (row_id, int(number)) if reps > 1 and suffix and number.isdecimal() else (str(item.id), 0)


def _entry(item: EvalInputItem, row_id: str) -> Any:
    """The dataset row with its own id again."""
    entry = item.full_dataset_entry
    if not isinstance(entry, dict):
        return entry
    return {key: row_id if isinstance(value, str | int) and value == item.id else value for key, value in entry.items()}


def _run_id(item: EvalInputItem) -> str | None:
    for step in item.trajectory:
        metadata = step.payload.metadata
        fields = metadata if isinstance(metadata, dict) else {} if metadata is None else metadata.model_dump()
        provided = fields.get("provided_metadata") or {}
        if "workflow_run_id" in provided:
            return str(provided["workflow_run_id"])
    return None


def _is_connection_error(error: BaseException | None) -> bool:
    """True if the cause chain shows that the endpoint failed or was unreachable, which is not the policy's fault."""
    from openai import APIConnectionError, InternalServerError

    failures = (APIConnectionError, InternalServerError)
    return any(isinstance(cause, failures) for cause in causes(error, implicit=True))


@entered_once
def quiet_nat() -> Iterator[None]:
    """Suppress the log lines that NAT and httpx write for every rollout; failures are counted and reported."""
    levels = {
        "nat.plugins.eval": logging.WARNING,
        "httpx": logging.WARNING,
        "httpx2": logging.WARNING,
        "nat.runtime": logging.CRITICAL,
        "nat.builder": logging.CRITICAL,
        "nat.observability": logging.WARNING,
        "nat.plugins.langchain": logging.CRITICAL,
        "nat.plugins.profiler": logging.ERROR,
    }
    before = {name: logging.getLogger(name).level for name in levels}
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"nat\.")
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
