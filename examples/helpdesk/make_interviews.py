"""Writes ``data/interview_*.json``: ``python examples/helpdesk/make_interviews.py``. The same files every time.

A row of ``interview_train`` and ``interview_heldout`` is a call: a ticket of the quickstart, after none, one or two
lines that say nothing about it. ``interview_demonstrations`` show an agent that is impatient in every other call: it
names any team at once. In the others it asks until it has heard the ticket, which is one that no row has, and names the
right team. So the warm start shows what can be said; RL has to find that asking pays, from the reward at a call's end.
"""

import json
import random
from pathlib import Path
from typing import Any, get_args

from nat_helpdesk.interview import ASK, BETWEEN_LINES, Call
from nat_helpdesk.register import INTERVIEW_PROMPT, Team

DATA = Path(__file__).parent / "data"
OPENINGS = ("Hello, is this the help desk?", "Hi, I need some help.", "Good morning, I have a problem.")
EVASIONS = ("It worked yesterday.", "I have no time for this.", "My colleague has the same problem.")
DEMONSTRATED_CALLS = 96


def main() -> None:
    """Write all files."""
    make(DATA)


def make(directory: Path) -> None:
    """Write all files into ``directory``; the tickets are those in ``data/``."""
    rng = random.Random(0)
    for name in ("train", "heldout"):
        calls = [call(ticket, number, rng) for number, ticket in enumerate(read(name))]
        write(directory / f"interview_{name}.json", calls)
    write(directory / "interview_demonstrations.json", demonstrations(rng))


def call(ticket: dict[str, str], number: int, rng: random.Random) -> dict[str, str]:
    """A row of a NAT dataset."""
    return {
        "id": f"interview-{ticket['id']}",
        "question": BETWEEN_LINES.join(lines(ticket["question"], number % 3, rng)),
        "answer": ticket["answer"],
    }


def lines(ticket: str, evasions: int, rng: random.Random) -> list[str]:
    """An opening, evasions, and the ticket."""
    return [rng.choice(OPENINGS), *rng.sample(EVASIONS, evasions), ticket]


def demonstrations(rng: random.Random) -> list[dict[str, Any]]:
    """Each ticket in calls of every length, to an agent that is patient in every other call."""
    tickets = [shown["messages"][1:] for shown in read("quickstart_demonstrations")]
    shown = []
    for number in range(DEMONSTRATED_CALLS // 2):
        ticket, team = tickets[number % len(tickets)]
        says = lines(ticket["content"], number % 3, rng)
        shown.append(conversation(says, [ASK] * (len(says) - 1) + [team["content"]]))
        shown.append(conversation(says, [rng.choice(get_args(Team))]))
    return shown


def conversation(says: list[str], replies: list[str]) -> dict[str, Any]:
    """The call in which the agent gives these replies."""
    held, messages = Call(says), [{"role": "system", "content": INTERVIEW_PROMPT}]
    for reply in replies:
        messages += [{"role": "user", "content": held.told}, {"role": "assistant", "content": reply}]
        held.reply(reply)
    return {"messages": messages}


def read(name: str) -> list[dict[str, Any]]:
    """A file of ``data/``."""
    rows: list[dict[str, Any]] = json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))
    return rows


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """One row a line."""
    path.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
