"""``rollouts/`` of a run directory."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from nat_plugin_evsys.errors import DataError
from nat_plugin_evsys.runs.rollouts import Collection, RolloutFacts, RolloutFiles


def test_what_is_written_is_read_and_listed_in_the_order_of_the_run(tmp_path: Path) -> None:
    files = RolloutFiles(tmp_path)
    assert files.collections() == []
    for collection in (Collection("heldout", 1), Collection("train", 0), Collection("epoch", 1)):
        files.write(collection, [f'{{"in": "{collection}", "text": "\\u2028é"}}'])
    assert list(map(str, files.collections())) == ["train-0000", "epoch-0001", "heldout-0001"]
    assert list(files.lines(Collection("epoch", 1))) == ['{"in": "epoch-0001", "text": "\\u2028é"}\n']
    assert list(files.lines(Collection("epoch", 2))) == []
    with gzip.open(tmp_path / "rollouts" / "train-0000.jsonl.gz", "rt") as file:
        assert file.read().count("\n") == 1


def test_a_rollout_is_one_line_to_every_reader(tmp_path: Path) -> None:
    files = RolloutFiles(tmp_path)
    files.write(Collection("epoch", 1), ['{"text": "\x85\u2028\u2029é"}'])
    (line,) = gzip.decompress(files.path(Collection("epoch", 1)).read_bytes()).decode().splitlines()
    assert json.loads(line) == {"text": "\x85\u2028\u2029é"}


def test_a_resumed_run_forgets_what_an_unfinished_epoch_left(tmp_path: Path) -> None:
    files = RolloutFiles(tmp_path)
    for epoch in (0, 1, 2):
        files.write(Collection("heldout", epoch), ["{}"])
    files.discard_after(1)
    assert files.collections() == [Collection("heldout", 0), Collection("heldout", 1)]


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    files = RolloutFiles(tmp_path)
    files.write(Collection("epoch", 1), ["{}"] * 100)
    path = files.path(Collection("epoch", 1))
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(DataError, match=r"epoch-0001\.jsonl\.gz cannot be read"):
        list(files.lines(Collection("epoch", 1)))


def test_facts_of_a_later_version_are_read_and_those_of_another_producer_refused() -> None:
    facts = RolloutFacts.of({"collection": "epoch", "epoch": 1, "row_id": "r", "attempt": 0, "invented_later": 1})
    assert (facts.row_id, facts.reward) == ("r", None)
    with pytest.raises(DataError, match="not a run's rollout"):
        RolloutFacts.of({"ancestry": {}})
