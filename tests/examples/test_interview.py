"""A call to the help desk, with a model whose replies are given."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from langchain_core.language_models.fake_chat_models import FakeListChatModel
from nat_helpdesk.interview import HUNG_UP, interview
from pydantic import Field

DATA = Path(__file__).parents[2] / "examples/helpdesk/data"
ROW = "Hello? / It worked yesterday. / My wifi is broken."


class Transcript(FakeListChatModel):
    """Says its replies in turn and keeps what it was asked."""

    asked: list[str] = Field(default_factory=list)

    def _call(self, messages, *args, **kwargs):  # type: ignore[no-untyped-def]
        self.asked.append(str(messages[-1].content))
        return super()._call(messages, *args, **kwargs)


@pytest.mark.parametrize(
    ("replies", "result", "heard"),
    [
        (["ask", "ask", "network"], "network", 3),
        (["printing"], "printing", 1),
        (["ask", " payroll\n"], "payroll", 2),
        (["What is wrong?"], "What is wrong?", 1),
        (["ask", "ask", "ask"], HUNG_UP, 3),
    ],
)
async def test_a_call_ends_as_it_must(replies: list[str], result: str, heard: int) -> None:
    model = Transcript(responses=replies)
    assert await interview(model, ROW, "Answer.") == result
    assert model.asked == ["Hello?", "It worked yesterday.", "My wifi is broken."][:heard]


def test_the_committed_files_are_what_the_script_writes(
    load_script: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    load_script("helpdesk/make_interviews.py").make(tmp_path)
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert written == {path.name: path.read_bytes() for path in DATA.glob("interview_*")}


async def test_a_demonstration_is_a_call_as_the_agent_holds_it() -> None:
    for shown in json.loads((DATA / "interview_demonstrations.json").read_text()):
        system, *turns = shown["messages"]
        told, replies = ([message["content"] for message in turns[first::2]] for first in (0, 1))
        model = Transcript(responses=replies)
        assert await interview(model, " / ".join(told), system["content"]) == replies[-1]
        assert model.asked == told


@pytest.mark.parametrize("name", ["train", "heldout"])
def test_a_call_ends_with_a_ticket_of_the_quickstart_and_its_team(name: str) -> None:
    tickets = json.loads((DATA / f"{name}.json").read_text())
    calls = json.loads((DATA / f"interview_{name}.json").read_text())
    assert [(call["question"].rpartition(" / ")[2], call["answer"]) for call in calls] == [
        (ticket["question"], ticket["answer"]) for ticket in tickets
    ]
    assert {call["question"].count(" / ") for call in calls} == {1, 2, 3}
