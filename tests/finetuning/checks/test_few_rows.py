"""What is said where ``rows_per_epoch`` divides nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from nat.data_models.config import Config
from nat.data_models.dataset_handler import EvalDatasetJsonlConfig

from nat_plugin_evsys.config import EvsysTrajectoryBuilderConfig
from nat_plugin_evsys.finetuning.preflight import few_rows_notice


@pytest.mark.parametrize(("size", "said"), [(None, False), (2, False), (3, False), (4, True)])
def test_more_rows_an_epoch_than_there_are(tmp_path: Path, size: int | None, said: bool) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"id": row, "question": "q", "answer": "a"}) + "\n" for row in range(3)))
    config = Config()
    config.trajectory_builders = {"b": EvsysTrajectoryBuilderConfig(rows_per_epoch=size)}
    config.finetuning.trajectory_builder = "b"
    notice = few_rows_notice(config, config.finetuning, EvalDatasetJsonlConfig(file_path=path))
    expected = "rows_per_epoch is 4, but the dataset has 3 rows, so every epoch visits all of them"
    assert notice == (expected if said else None)
