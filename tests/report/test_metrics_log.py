"""metrics.jsonl: complete rows, strict JSON, continuous over a resume."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nat_plugin_evsys.errors import DataError
from nat_plugin_evsys.report.metrics_log import RELOADED, MetricsLog, reloads


def strict(text: str) -> Any:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


def epochs(log: MetricsLog) -> list[int]:
    return [row["epoch"] for row in log.rows() if row["event"] == "epoch"]


def test_rows_come_back_as_written(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    assert log.rows() == []
    log.append("validation", 0, reward=0.25)
    log.append("epoch", 1, dropped=Counter(a=2), path=tmp_path, loss=np.float32(0.5))
    first, second = log.rows()
    assert first == {"event": "validation", "epoch": 0, "reward": 0.25, "time": first["time"]}
    assert second["dropped"] == {"a": 2}
    assert second["path"] == str(tmp_path)
    assert second["loss"] == 0.5


def test_nan_and_infinity_are_null_and_named(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append("epoch", 1, loss=math.nan, kl=np.float64("inf"), per_step=[1.0, math.nan])
    row = strict(log.path.read_text())
    assert row["loss"] is None
    assert row["kl"] is None
    assert row["per_step"] == [1.0, None]
    assert row["non_finite"] == {"loss": "nan", "kl": "inf"}


def test_a_value_without_json_form_writes_nothing(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append("epoch", 1)
    before = log.path.read_bytes()
    with pytest.raises(TypeError, match="object"):
        log.append("epoch", 2, loss=object())
    assert log.path.read_bytes() == before


def test_truncate_after_leaves_no_gap_and_no_duplicate(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append("warm_start", 0)
    log.append("validation", 0, reward=0.1)
    for epoch in (1, 2, 3):
        log.append("epoch", epoch)
        log.append("validation", epoch, reward=0.1)
    assert log.truncate_after(2) == 2
    assert log.truncate_after(2) == 0
    for epoch in (3, 4):
        log.append("epoch", epoch)
    assert epochs(log) == [1, 2, 3, 4]
    assert [row["epoch"] for row in log.rows() if row["event"] == "validation"] == [0, 1, 2]
    assert MetricsLog(tmp_path / "none.jsonl").truncate_after(0) == 0


def test_every_possible_cut_of_the_last_line_is_mended(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append("epoch", 1, note="ä")
    first = log.path.stat().st_size
    log.append("epoch", 2, note="ä")
    whole = log.path.read_bytes()
    for size in range(first, len(whole) + 1):
        log.path.write_bytes(whole[:size])
        survives = size >= len(whole) - 1  # all of it but the newline
        assert epochs(log) == ([1, 2] if survives else [1]), size
        log.append("epoch", 3)
        assert epochs(log) == ([1, 2, 3] if survives else [1, 3]), size
        for line in log.path.read_text(encoding="utf-8").splitlines():
            strict(line)


def test_a_broken_line_that_no_crash_explains_is_refused_by_number(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append("epoch", 1)
    log.path.write_text("{broken\n" + log.path.read_text())
    with pytest.raises(DataError, match=r"metrics\.jsonl:1"):
        log.rows()


def test_where_reloads_went_back_to(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for epoch, row in enumerate(({}, {}, {RELOADED: "epoch-0001"}, {}, {RELOADED: "epoch-0003"}, {}), 1):
        log.append("epoch", epoch, **row)
    assert reloads(log.rows()) == {3: 1, 5: 1}, "what epoch 3 saved is what epoch 1 had saved"
