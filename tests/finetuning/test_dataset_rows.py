"""An epoch's rows are chosen before NAT makes items of them, and become the items that they would have become."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from nat.data_models.dataset_handler import (
    EvalDatasetBaseConfig,
    EvalDatasetCsvConfig,
    EvalDatasetCustomConfig,
    EvalDatasetJsonConfig,
    EvalDatasetJsonlConfig,
)
from nat.data_models.evaluator import EvalInput, EvalInputItem
from nat.plugins.eval.dataset_handler.dataset_handler import DatasetHandler

from nat_plugin_evsys.finetuning.workflow.dataset_rows import DatasetRows
from nat_plugin_evsys.rollouts.row_batches import RowBatches

REPS = 3
ROWS: list[dict[str, Any]] = [
    {
        "id": number,
        "question": f"Question {number}?",
        "answer": None if number == 2 else "yes",
        "more": {"at": [number]},
    }
    for number in range(9)
]
ROWS[4]["question"] = "  "  # NAT passes it over
ROWS[6]["id"] = 5  # and what has the id of an earlier row
UNSTRUCTURED: dict[str, Any] = {"structure": {"disable": True}}
FILTERED: dict[str, Any] = {"filter": {"denylist": {"field": {"id": ["7"]}}}}


def items_of(dataset: EvalDatasetBaseConfig | None, reps: int = REPS) -> list[EvalInputItem]:
    assert dataset is not None
    return DatasetHandler(dataset, reps=reps, concurrency=1).get_eval_input_from_dataset("").eval_input_items


def dump(items: Sequence[EvalInputItem]) -> str:
    return json.dumps([item.model_dump() for item in items], default=str)


def written(directory: Path, kind: type[EvalDatasetBaseConfig], rows: Sequence[dict[str, Any]], **settings: Any) -> Any:
    path = directory / "rows"
    frame = pd.DataFrame(rows)
    if kind is EvalDatasetCsvConfig:
        frame.to_csv(path, index=False)
    else:
        frame.to_json(path, orient="records", lines=kind is EvalDatasetJsonlConfig)
    return kind(file_path=path, **settings)


def read_rows(file_path: Path) -> EvalInput:
    rows = json.loads(file_path.read_text())
    return EvalInput(
        eval_input_items=[
            EvalInputItem(id=row["id"], input_obj=row["question"], expected_output_obj="", full_dataset_entry=row)
            for row in rows
        ]
    )


class Counted(EvalDatasetJsonConfig):
    """Counts how often its file is read."""

    def parser(self) -> Any:
        def read(path: Path) -> pd.DataFrame:
            reads.append(path)
            return pd.read_json(path)

        return read, {}


reads: list[Path] = []


@pytest.mark.parametrize("settings", [{}, UNSTRUCTURED, FILTERED], ids=["plain", "unstructured", "filtered"])
@pytest.mark.parametrize("kind", [EvalDatasetJsonConfig, EvalDatasetJsonlConfig, EvalDatasetCsvConfig])
@pytest.mark.parametrize("reps", [1, REPS])
async def test_the_items_are_those_of_the_chosen_rows(
    kind: type[EvalDatasetBaseConfig], settings: dict[str, Any], reps: int, tmp_path: Path
) -> None:
    dataset = written(tmp_path, kind, ROWS, **settings)
    everything = items_of(dataset, reps)
    row_ids = list(dict.fromkeys(str(item.id).split("_rep")[0] for item in everything))
    rows = DatasetRows()
    for epoch in range(5):
        asked: list[Sequence[str]] = []

        def choice(ids: Sequence[str], epoch: int = epoch, asked: list[Sequence[str]] = asked) -> Collection[str]:
            asked.append(ids)
            return RowBatches(3, seed=7).rows(ids, epoch)

        found = items_of(await rows.choose(dataset, choice), reps)
        chosen = set(choice(row_ids))
        assert asked[0] == row_ids
        assert dump(found) == dump([item for item in everything if str(item.id).split("_rep")[0] in chosen])


async def test_no_item_is_made_of_the_other_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = written(tmp_path, Counted, [{"id": f"row-{n}", "question": "?", "answer": ""} for n in range(500)])
    made: list[int] = []
    original = DatasetHandler.get_eval_input_from_df

    def counting(self: DatasetHandler, input_df: pd.DataFrame) -> EvalInput:
        made.append(len(input_df))
        return original(self, input_df)

    monkeypatch.setattr(DatasetHandler, "get_eval_input_from_df", counting)
    reads.clear()
    rows = DatasetRows()
    for _ in range(3):
        items_of(await rows.choose(dataset, lambda ids: ids[:2]))
    assert made == [2 * REPS] * 3
    assert len(reads) == 1


async def test_a_file_that_has_changed_is_read_again(tmp_path: Path) -> None:
    dataset = written(tmp_path, EvalDatasetJsonConfig, ROWS[:2])
    rows = DatasetRows()
    assert [item.id for item in items_of(await rows.choose(dataset, lambda ids: ids), reps=1)] == [0, 1]
    written(tmp_path, EvalDatasetJsonConfig, ROWS[:4])
    assert [item.id for item in items_of(await rows.choose(dataset, lambda ids: ids), reps=1)] == [0, 1, 2, 3]


async def test_what_an_evaluator_does_to_an_item_is_gone_in_the_next_epoch(tmp_path: Path) -> None:
    dataset = written(tmp_path, EvalDatasetJsonConfig, ROWS)
    rows = DatasetRows()
    for _ in range(2):
        (item,) = items_of(await rows.choose(dataset, lambda ids: ids[:1]), reps=1)
        assert item.full_dataset_entry["more"] == {"at": [0]}
        item.full_dataset_entry["more"]["at"].append("changed")


async def test_a_custom_dataset_is_read_for_each_epoch(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    dataset = EvalDatasetCustomConfig(file_path=path, function=f"{__name__}.read_rows")
    rows = DatasetRows()
    for last in (3, 4):
        path.write_text(json.dumps(ROWS[:last]))
        found = items_of(await rows.choose(dataset, lambda ids: ids[-1:]))
        assert [item.id for item in found] == [f"{last - 1}_rep{rep}" for rep in range(REPS)]


async def test_of_a_dataset_without_rows_there_is_nothing_to_choose(tmp_path: Path) -> None:
    dataset = written(tmp_path, EvalDatasetJsonConfig, [])
    assert await DatasetRows().choose(dataset, lambda ids: ids) is None
