"""Which dataset rows a run takes."""

from __future__ import annotations

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from nat.data_models.config import Config
from nat.data_models.dataset_handler import EvalDatasetJsonConfig
from nat.data_models.finetuning import RewardFunctionConfig
from nat.plugins.eval.dataset_handler.dataset_handler import DatasetHandler

from nat_plugin_evsys.config import EvsysExactMatchConfig, EvsysTrainerAdapterConfig
from nat_plugin_evsys.errors import ConfigError, DataError
from nat_plugin_evsys.finetuning.checks.datasets import check_dataset, content_of, dataset_of, rows_by_question
from nat_plugin_evsys.rollouts.traces.record import question_key


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


@pytest.mark.parametrize("question", ["Is it?", 5, {"b": [1, 2], "a": "x"}])
def test_a_row_is_found_by_the_question_of_a_record(question: Any, tmp_path: Path) -> None:
    dataset = config_of([{"id": "1", "question": question, "answer": "b"}], tmp_path).eval.general.dataset
    assert dataset is not None
    recorded = json.loads(json.dumps(question, sort_keys=True))
    assert rows_by_question(dataset)[question_key(recorded)]["answer"] == "b"


ROWS = [{"id": 1, "question": "a", "answer": "b"}, {"id": 2, "question": "c", "answer": "d"}]


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv"])
def test_another_file_is_parsed_by_its_suffix_and_read_by_the_same_keys(suffix: str, tmp_path: Path) -> None:
    config = config_of([], tmp_path, id_key="number", filter={"denylist": {"field": {"number": [2]}}})
    path, frame = tmp_path / f"other.{suffix}", pd.DataFrame(ROWS).rename(columns={"id": "number"})
    write = {
        "json": frame.to_json,
        "jsonl": partial(frame.to_json, lines=True),
        "csv": partial(frame.to_csv, index=False),
    }
    write[suffix](path, **({} if suffix == "csv" else {"orient": "records"}))
    for given in (path, str(path), {"file_path": str(path)}, {"_type": suffix, "file_path": str(path)}):
        dataset = dataset_of(config, given)
        check_dataset(config, dataset)
        assert (dataset.type, dataset.id_key) == (suffix, "number")
        read = DatasetHandler(dataset, reps=1, concurrency=1).get_eval_input_from_dataset("")
        assert [item.input_obj for item in read.eval_input_items] == ["a"]
    assert content_of(dataset)["rows"] == 2


def test_lists_of_a_parquet_file_are_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pd, "read_parquet", pd.read_pickle)  # such a file needs pyarrow, and gives these arrays
    answers = [np.array(["b", "c"], dtype=object), np.array([], dtype=object)]
    path = tmp_path / "rows.parquet"
    pd.DataFrame({"id": [1, 2], "question": ["a", "c"], "answer": answers}).to_pickle(path)
    config = config_of([], tmp_path)
    config.eval.evaluators = {"right": EvsysExactMatchConfig()}
    config.finetuning.reward_function = RewardFunctionConfig(name="right")
    dataset = dataset_of(config, path)
    check_dataset(config, dataset)
    assert [row["answer"] for row in rows_by_question(dataset).values()] == [["b", "c"], []]


def test_wrong_settings_of_a_dataset_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"validation_dataset: (.|\n)*file_pth"):
        dataset_of(config_of(ROWS, tmp_path), {"_type": "csv", "file_pth": "x"}, what="validation_dataset")


def test_a_question_that_is_no_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="`question` is not text in every row"):
        check_dataset(config_of([{"id": 1, "question": 7, "answer": "b"}], tmp_path))


def test_a_changed_file_is_noticed(tmp_path: Path) -> None:
    before = content_of(dataset_of(config_of(ROWS, tmp_path), None))
    assert content_of(dataset_of(config_of(ROWS, tmp_path), None)) == before
    now = content_of(dataset_of(config_of(ROWS[:1], tmp_path), None))
    assert (before["rows"], now["rows"]) == (2, 1)
    assert now["sha256"] != before["sha256"]


@pytest.mark.parametrize("answers", [[None, None], ["b", " "], ["", ""]])
def test_our_evaluators_need_an_answer_in_every_row(tmp_path: Path, answers: list[str | None]) -> None:
    rows = [{"id": str(n), "question": "a"} | ({} if a is None else {"answer": a}) for n, a in enumerate(answers)]
    config = config_of(rows, tmp_path)
    check_dataset(config)  # another reward may need none
    config.eval.evaluators = {"right": EvsysExactMatchConfig()}
    config.finetuning.reward_function = RewardFunctionConfig(name="right")
    with pytest.raises(DataError, match=r"row \d has no `answer` .*evsys_exact_match.*structure\.answer_key") as caught:
        check_dataset(config)
    assert str(tmp_path / "rows.json") in str(caught.value)
    config.finetuning.reward_function = None
    config.trainer_adapters = {"b": EvsysTrainerAdapterConfig(policy="p", reward=RewardFunctionConfig(name="right"))}
    with pytest.raises(DataError, match="has no `answer`"):
        check_dataset(config)


def test_a_missing_file_is_named_with_its_setting_and_whole_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = config_of(ROWS, tmp_path)
    with pytest.raises(
        ConfigError, match=r"trainers\.t\.validation_dataset: no file at .*`data/x\.json` is rel"
    ) as caught:
        check_dataset(config, dataset_of(config, "data/x.json"), "trainers.t.validation_dataset")
    assert f"no file at {tmp_path / 'data' / 'x.json'} (" in str(caught.value)
