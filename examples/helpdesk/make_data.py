"""Writes ``data/*.json``: ``python examples/helpdesk/make_data.py``. The same files every time.

``train`` and ``heldout`` are for the quickstart: one word of a team in a sentence, the answer is the team. The two
share the words, never a sentence with its word. ``quickstart_demonstrations`` show the answer to four tickets of every
team, about a word that neither of the two has.

``tools_train`` and ``tools_heldout`` are for the agents with a tool: two words of one team, the answer is the desk that
the tool tells. ``demonstrations`` and ``react_demonstrations`` show such an agent how to call the tool and how to
answer. They show the right team for one word that no ticket has, and for one word of two teams; for every other word
they go through the teams in turn, so that the warm start leaves the agent guessing there: which word belongs to which
team is what reinforcement finetuning learns.
"""

import json
from pathlib import Path
from typing import Any, get_args

import yaml
from nat.plugins.langchain.agent.base import INPUT_SCHEMA_MESSAGE
from nat.plugins.langchain.agent.react_agent.prompt import SYSTEM_PROMPT, USER_PROMPT
from nat_helpdesk.register import DESCRIPTION, DESKS, RouteTicketInput, Team

HERE = Path(__file__).parent
QUICKSTART = HERE.parents[1] / "configs" / "quickstart.yml"
TOOL_AGENT = HERE.parents[1] / "configs" / "helpdesk_tools.yml"
TOOL = "route_ticket"
REPEATS = 3

TEAMS: tuple[Team, ...] = get_args(Team)
WORDS: dict[Team, tuple[str, str, str]] = {
    "network": ("wifi", "internet", "vpn"),
    "printing": ("printer", "toner", "scanner"),
    "accounts": ("password", "login", "username"),
    "payroll": ("salary", "payslip", "bonus"),
}
SHOWN: dict[Team, str] = {"network": "router", "printing": "copier", "accounts": "profile", "payroll": "overtime"}
TEAMS_SHOWN: tuple[Team, ...] = ("network", "printing")
SENTENCES = ("My {} and {} do not work.", "The {} and my {} failed.")
ROUTING_SENTENCES = (
    "My {} is broken.",
    "I need help with my {}.",
    "There is a problem with the {}.",
    "Who can look at my {}?",
    "Please check the {} today.",
    "Something is wrong with my {} again.",
    "The {} has failed since Monday.",
    "Can someone fix the {}?",
)
DEMONSTRATED: dict[Team, str] = {
    "network": "ethernet",
    "printing": "inkjet",
    "accounts": "registration",
    "payroll": "wages",
}

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": TOOL,
            "description": DESCRIPTION,
            "parameters": {
                "properties": {"team": {"enum": list(TEAMS), "type": "string"}},
                "required": ["team"],
                "type": "object",
            },
        },
    }
]


def answer(team: Team) -> str:
    """The final answer once the ticket is with ``team``."""
    return f"Please go to desk {DESKS[team]}."


def routing_tickets() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Rows of the quickstart: for every word two training tickets and, in another sentence, one held-out ticket."""
    train: list[dict[str, str]] = []
    heldout: list[dict[str, str]] = []
    words = [(word, team) for team in TEAMS for word in (*WORDS[team], SHOWN[team])]
    for number, (word, team) in enumerate(words):
        for rows, name, shift in ((train, "train", 0), (train, "train", 5), (heldout, "heldout", 3)):
            sentence = ROUTING_SENTENCES[(number + shift) % len(ROUTING_SENTENCES)]
            rows.append({"id": f"{name}-{len(rows) + 1:02}", "question": sentence.format(word), "answer": team})
    return train, heldout


def one_word_demonstrations(system_prompt: str) -> list[dict[str, Any]]:
    """Four sentences with the demonstrated word of every team."""
    return [
        {
            "messages": [
                {"role": "system", "content": system_prompt},
                {"role": "user", "content": sentence.format(word)},
                {"role": "assistant", "content": team},
            ]
        }
        for sentence in ROUTING_SENTENCES[::2]
        for team, word in DEMONSTRATED.items()
    ]


def tickets() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Rows of the training and of the held-out dataset of the agents with a tool."""
    train: list[dict[str, str]] = []
    heldout: list[dict[str, str]] = []
    for row, team in enumerate(TEAMS):
        for k in range(3):
            first, second = WORDS[team][k], WORDS[team][(k + 1) % 3]
            train.append(_ticket("tools-train", len(train), SENTENCES[(k + row) % 2].format(first, second), team))
            for sentence in SENTENCES:
                heldout.append(_ticket("tools-heldout", len(heldout), sentence.format(second, first), team))
    return train, heldout


def _ticket(name: str, number: int, question: str, team: Team) -> dict[str, str]:
    return {"id": f"{name}-{number + 1:02}", "question": question, "answer": answer(team)}


def demonstrated() -> list[tuple[str, Team]]:
    """``(question, team the demonstration routes it to)`` of each demonstration."""
    shown: list[tuple[str, Team]] = []
    for row, team in enumerate(TEAMS):
        first, second, third = WORDS[team]
        words = [SHOWN[team], first] if team in TEAMS_SHOWN else [SHOWN[team]]
        shown += [(s.format(word, word), team) for s in SENTENCES for word in words for _ in range(REPEATS)]
        if team in TEAMS_SHOWN:
            pairs = [(second, third), (third, second)]
        else:
            pairs = [(first, second), (second, third), (third, first), (second, first), (third, second), (first, third)]
        for turn, guess in enumerate(TEAMS):
            pair = pairs[(turn + row) % len(pairs)]
            shown.append((SENTENCES[turn % 2].format(*pair), guess))
    return shown


def tool_calling_demonstration(question: str, team: Team, system_prompt: str) -> dict[str, Any]:
    """The conversation as NAT's ``tool_calling_agent`` has it."""
    call = {"name": TOOL, "arguments": json.dumps({"team": team})}
    return {
        "messages": [
            {"role": "system", "content": system_prompt},
            {"role": "user", "content": question},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "call_1", "type": "function", "function": call}],
            },
            {"role": "tool", "tool_call_id": "call_1", "content": f"desk {DESKS[team]}"},
            {"role": "assistant", "content": answer(team)},
        ],
        "tools": TOOLS,
    }


def react_demonstration(question: str, team: Team) -> dict[str, Any]:
    """The conversation as NAT's ``react_agent`` has it, with its default system prompt."""
    schema = INPUT_SCHEMA_MESSAGE.format(schema=RouteTicketInput.model_fields)
    action_input = json.dumps({"team": team})
    return {
        "messages": [
            {
                "role": "system",
                "content": SYSTEM_PROMPT.format(tools=f"\n{TOOL}: {DESCRIPTION}. {schema}", tool_names=f",{TOOL}"),
            },
            {"role": "user", "content": USER_PROMPT.format(chat_history="", question=question)},
            {
                "role": "assistant",
                "content": f"Thought: I should route the ticket.\nAction: {TOOL}\nAction Input: {action_input}",
            },
            {"role": "user", "content": f"desk {DESKS[team]}"},
            {"role": "assistant", "content": f"Thought: I now know the final answer\nFinal Answer: {answer(team)}"},
        ]
    }


def make(directory: Path) -> None:
    """Write every file into ``directory``."""
    system_prompt = _system_prompt(TOOL_AGENT)
    train, heldout = routing_tickets()
    tools_train, tools_heldout = tickets()
    shown = demonstrated()
    written = {
        "train": train,
        "heldout": heldout,
        "quickstart_demonstrations": one_word_demonstrations(_system_prompt(QUICKSTART)),
        "tools_train": tools_train,
        "tools_heldout": tools_heldout,
        "demonstrations": [tool_calling_demonstration(*pair, system_prompt) for pair in shown],
        "react_demonstrations": [react_demonstration(*pair) for pair in shown],
    }
    for name, rows in written.items():
        lines = ",\n".join(json.dumps(row) for row in rows)
        (directory / f"{name}.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def _system_prompt(config: Path) -> str:
    return str(yaml.safe_load(config.read_text(encoding="utf-8"))["workflow"]["system_prompt"])


if __name__ == "__main__":
    make(HERE / "data")
