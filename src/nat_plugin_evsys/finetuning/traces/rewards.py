"""The rewards of records: a feedback in each, or the scores of a NAT evaluator."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nat.data_models.dataset_handler import EvalDatasetJsonConfig
from nat.data_models.evaluate_runtime import EvaluationRunConfig
from nat.data_models.evaluator import EvalInput
from nat.data_models.intermediate_step import IntermediateStep
from nat.plugins.eval.data_models.evaluator_io import EvalOutputItem
from pydantic import TypeAdapter, ValidationError

from nat_plugin_evsys.finetuning.workflow.evaluation import PolicyEvaluation, evaluation_config, quiet_nat
from nat_plugin_evsys.finetuning.workflow.limits import exits_are_errors
from nat_plugin_evsys.report.quiet import quiet_tqdm
from nat_plugin_evsys.rollouts.traces.record import Record, at_path, question_key

if TYPE_CHECKING:
    from nat.data_models.config import Config

    from nat_plugin_evsys.finetuning.workflow.sessions import Rollouts

_STEPS = TypeAdapter(list[IntermediateStep])

Rows = Mapping[Any, Mapping[str, Any]]
"""The rows of the run's dataset by their questions."""


def feedback_of(record: Record, path: str, values: Mapping[str, float]) -> Any:
    """What the record has at ``path``; a word has its value in ``values``."""
    given = at_path(record.entry, path)
    return values.get(given, given) if isinstance(given, str) else given


class RecordedEvaluation(PolicyEvaluation):
    """Lets the evaluators see what is recorded: NAT reads rows as a data frame, which makes the number 7 of "007".

    Args:
        entries: of each item by its id, with the keys of a row of ``nat eval``.
    """

    def __init__(
        self,
        config: EvaluationRunConfig,
        rollouts: Rollouts,
        evaluator_timeout: float,
        entries: Mapping[str, dict[str, Any]],
    ) -> None:
        super().__init__(config, rollouts, evaluator_timeout)
        self._entries = entries

    async def run_evaluators(self, evaluators: dict[str, Any]) -> None:
        """Run the evaluators on the items as they are recorded, and on ATIF samples of these."""
        items = self.eval_input or EvalInput(eval_input_items=[])
        for item in items.eval_input_items:
            item.full_dataset_entry = entry = self._entries[str(item.id)]
            item.input_obj, item.output_obj = entry["question"], entry["generated_answer"]
            item.expected_output_obj = entry["answer"]
        if self.atif_eval_samples:
            self.atif_eval_samples = self.atif_adapter.build_samples(items)
        await super().run_evaluators(evaluators)


async def evaluator_scores(
    records: Sequence[Record],
    rows: Rows,
    rollouts: Rollouts,
    *,
    config: Config,
    reward_name: str,
    evaluator_timeout: float,
) -> list[Any]:
    """What the evaluator says of each record, as NAT's ``--skip_workflow`` runs it on outputs of an earlier run.

    Args:
        rows: have the answer where a record has none.

    Returns:
        NAT's output item of each record, with an error where NAT cannot read the steps; None where the evaluator gave
        none.
    """
    entries = {
        f"record-{number}": {
            **rows.get(question_key(record.question), {}),
            "id": f"record-{number}",
            "question": record.question,
            "answer": answer_to(record, rows),
            "generated_answer": record.output,
            "intermediate_steps": record.steps,
        }
        for number, record in enumerate(records)
    }
    problems = {name: _steps_problem(entry["intermediate_steps"]) for name, entry in entries.items()}
    rows_of_nat = [
        {"id": name, "question": name, "intermediate_steps": entry["intermediate_steps"]}
        for name, entry in entries.items()
        if problems[name] is None
    ]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "records.json"
        path.write_text(json.dumps(rows_of_nat), encoding="utf-8")
        dataset = EvalDatasetJsonConfig(file_path=path)
        run = EvaluationRunConfig(
            config_file=evaluation_config(config, [reward_name], dataset, None), skip_workflow=True, write_output=False
        )
        with quiet_tqdm(), quiet_nat(), exits_are_errors():
            output = await RecordedEvaluation(run, rollouts, evaluator_timeout, entries).run_and_evaluate()
    scores: dict[str, Any] = {
        name: EvalOutputItem(id=name, score=None, reasoning=None, error=problem)
        for name, problem in problems.items()
        if problem is not None
    }
    scores |= {str(item.id): item for _, result in output.evaluation_results for item in result.eval_output_items}
    return [scores.get(name) for name in entries]


def _steps_problem(steps: Sequence[Mapping[str, Any]]) -> str | None:
    """Why NAT cannot show these steps to an evaluator, or None."""
    try:
        _STEPS.validate_python(steps)
    except ValidationError as error:
        first = error.errors()[0]
        return f"NAT cannot read its step {'.'.join(map(str, first['loc']))}: {first['msg']}"
    return None


def answer_to(record: Record, rows: Rows) -> Any:
    """The expected answer, of the record or of the dataset's row with its question; "" if neither has one."""
    return rows.get(question_key(record.question), {}).get("answer", "") if record.expected is None else record.expected
