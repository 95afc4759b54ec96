"""The rewards of records: a feedback in each, or the scores of a NAT evaluator."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nat.data_models.dataset_handler import EvalDatasetJsonConfig
from nat.data_models.evaluate_runtime import EvaluationRunConfig

from nat_plugin_evsys.finetuning.workflow.evaluation import PolicyEvaluation, evaluation_config, quiet_nat
from nat_plugin_evsys.finetuning.workflow.limits import exits_are_errors
from nat_plugin_evsys.report.quiet import quiet_tqdm
from nat_plugin_evsys.rollouts.traces.record import Record, at_path, question_key

if TYPE_CHECKING:
    from nat.data_models.config import Config

    from nat_plugin_evsys.finetuning.workflow.sessions import Rollouts

Rows = Mapping[Any, Mapping[str, Any]]
"""The rows of the run's dataset by their questions."""


def feedback_of(record: Record, path: str, values: Mapping[str, float]) -> Any:
    """What the record has at ``path``; a word has its value in ``values``."""
    given = at_path(record.entry, path)
    return values.get(given, given) if isinstance(given, str) else given


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
        NAT's output item of each record; None where the evaluator gave none.
    """
    entries = [
        {
            **rows.get(question_key(record.question), {}),
            "id": f"record-{number}",
            "question": record.question,
            "answer": answer_to(record, rows),
            "generated_answer": record.output,
            "intermediate_steps": record.steps,
        }
        for number, record in enumerate(records)
    ]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "records.json"
        path.write_text(json.dumps(entries), encoding="utf-8")
        dataset = EvalDatasetJsonConfig(file_path=path)
        run = EvaluationRunConfig(
            config_file=evaluation_config(config, [reward_name], dataset, None), skip_workflow=True, write_output=False
        )
        with quiet_tqdm(), quiet_nat(), exits_are_errors():
            output = await PolicyEvaluation(run, rollouts, None, evaluator_timeout).run_and_evaluate()
    scores = {str(item.id): item for _, result in output.evaluation_results for item in result.eval_output_items}
    return [scores.get(f"record-{number}") for number in range(len(records))]


def answer_to(record: Record, rows: Rows) -> Any:
    """The expected answer, of the record or of the dataset's row with its question; "" if neither has one."""
    return rows.get(question_key(record.question), {}).get("answer", "") if record.expected is None else record.expected
