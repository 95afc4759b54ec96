import json
from pathlib import Path
from types import ModuleType

import pytest

DATA = Path(__file__).parents[2] / "examples/helpdesk/data"


def rows(name: str) -> list[dict[str, str]]:
    return list(json.loads((DATA / f"{name}.json").read_text(encoding="utf-8")))


def test_the_committed_files_are_what_make_data_writes(make_data: ModuleType, tmp_path: Path) -> None:
    make_data.make(tmp_path)
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    kept = {path for path in DATA.iterdir() if not path.name.startswith("interview_")}
    assert written == {path.name: path.read_bytes() for path in kept}


@pytest.mark.parametrize(("train", "heldout"), [("train", "heldout"), ("tools_train", "tools_heldout")])
def test_datasets_are_well_formed_and_disjoint(train: str, heldout: str) -> None:
    both = [*rows(train), *rows(heldout)]
    assert all(set(row) == {"id", "question", "answer"} and all(row.values()) for row in both)
    assert len({row["id"] for row in both}) == len(both)
    assert len({row["question"] for row in both}) == len(both)
    assert {row["answer"] for row in rows(train)} == {row["answer"] for row in rows(heldout)}


def test_the_quickstart_demonstrates_no_word_that_a_ticket_has(make_data: ModuleType) -> None:
    tickets = " ".join(row["question"] for row in [*rows("train"), *rows("heldout")])
    assert not [word for word in make_data.DEMONSTRATED.values() if word in tickets]


@pytest.mark.parametrize(("train", "heldout"), [("train", "heldout"), ("tools_train", "tools_heldout")])
def test_held_out_questions_use_only_words_of_the_training_questions(train: str, heldout: str) -> None:
    def words(name: str) -> set[str]:
        return {word.strip(".?,").lower() for row in rows(name) for word in row["question"].split()}

    assert words(heldout) <= words(train)
