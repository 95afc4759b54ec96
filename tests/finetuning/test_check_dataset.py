"""Which dataset rows a run takes."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from nat.data_models.config import Config
from nat.data_models.dataset_handler import EvalDatasetJsonConfig

from nat_plugin_evsys.errors import DataError
from nat_plugin_evsys.finetuning.preflight import check_dataset


def config_of(rows: list[dict[str, Any]], tmp_path: Path, **dataset: Any) -> Config:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    config = Config()
    config.eval.general.dataset = EvalDatasetJsonConfig(file_path=path, **dataset)
    return config


def test_rows_without_an_answer_are_taken_and_it_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        check_dataset(config_of([{"id": "1", "question": "Play."}, {"id": "2", "question": "Again."}], tmp_path), None)
    assert "no row has `answer`; evaluators are given an empty answer" in caplog.text


def test_one_row_without_an_answer_is_a_mistake(tmp_path: Path) -> None:
    rows = [{"id": "1", "question": "a", "answer": "b"}, {"id": "2", "question": "a"}]
    with pytest.raises(DataError, match="row 2 has no `answer`"):
        check_dataset(config_of(rows, tmp_path), None)


def test_a_filter_that_leaves_nothing_is_named(tmp_path: Path) -> None:
    rows = [{"id": "1", "question": "a", "answer": "b"}]
    empty = {"denylist": {"field": {"id": ["1"]}}}
    with pytest.raises(DataError, match="filter leaves none of its 1 rows"):
        check_dataset(config_of(rows, tmp_path, filter=empty), None)
