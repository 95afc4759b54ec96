"""The made-up chats that ``builtin/tiny`` is taught before anybody finetunes it.

A low-rank adapter over purely random weights needs thousands of steps to find the one word of a prompt that matters. So
the model is first taught what any pretrained model brings along, and nothing of the task that the help desk trains:

- *reading*: the reply names the thing that the user's sentence is about;
- *sorting*: at a help desk the reply is a team. Which team handles ``FAMILIAR`` things is fixed; for the ``TICKET``
  things it is drawn at random each time, so the model answers those by guessing;
- *tools*: a Qwen/Hermes-style tool call with the thing as its argument (or, for a tool that takes a team, one drawn at
  random), and an answer from the tool's result.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

Message = dict[str, Any]
Chat = tuple[list[Message], list[dict[str, Any]] | None]

TEAMS = ["network", "printing", "accounts", "payroll"]
TICKET = [
    "wifi",
    "internet",
    "vpn",
    "router",
    "printer",
    "toner",
    "scanner",
    "copier",
    "password",
    "login",
    "username",
    "profile",
    "salary",
    "payslip",
    "bonus",
    "overtime",
]
FAMILIAR = [
    "cable",
    "paper",
    "email",
    "expenses",
    "battery",
    "headset",
    "door",
    "parking",
    "city",
    "order",
    "customer",
    "money",
    "weather",
    "news",
    "text",
    "list",
    "code",
    "question",
    "capital",
    "name",
    "bus",
    "train",
    "foot",
    "summary",
]
STATES = ["does not work", "is broken", "is late", "is missing", "is full", "is dark", "is gone", "is locked"]
SENTENCES = [
    "My {x} {v}.",
    "The {x} {v}.",
    "Where is my {x}?",
    "I need help with my {x}.",
    "There is a problem with the {x}.",
    "Who can look at my {x}?",
    "Please check the {x} today.",
    "Something is wrong with my {x} again.",
    "The {x} has failed since Monday.",
    "Can someone fix the {x}?",
    "I have a question about the {x}.",
    "Nobody can use the {x} this morning.",
]
TOOLS = [
    ("search", "Search the web for a query and return the best results.", "query"),
    ("get_weather", "Get the current weather for a city.", "city"),
    ("calculator", "Perform a mathematical calculation.", "text"),
    ("order", "The name of the thing that the customer would like.", "name"),
]
ROUTING_TOOL = ("route_ticket", "Route the ticket to a team. Returns its desk.", "team")
HELP_DESK = "You are a help desk."
TOOL_SHARE = 0.3
READING_SHARE = 0.35


def chats(seed: int, count: int) -> Iterator[Chat]:
    """``count`` made-up conversations: ``(messages, tools or None)`` in OpenAI form."""
    rng = random.Random(seed)
    for _ in range(count):
        kind = rng.random()
        if kind < TOOL_SHARE:
            yield _tool_chat(rng)
        elif kind < TOOL_SHARE + READING_SHARE:
            thing = rng.choice(TICKET + FAMILIAR)
            yield (
                [*_system(rng, "You are a helpful assistant.", "Explain the question."), *_turn(rng, thing, thing)],
                None,
            )
        else:
            familiar = rng.random() < 0.5
            thing = rng.choice(FAMILIAR if familiar else TICKET)
            team = TEAMS[FAMILIAR.index(thing) % len(TEAMS)] if familiar else rng.choice(TEAMS)
            yield [{"role": "system", "content": HELP_DESK}, *_turn(rng, thing, team)], None


def _tool_chat(rng: random.Random) -> Chat:
    thing = rng.choice(TICKET + FAMILIAR)
    if rng.random() < 0.5:
        name, description, argument = ROUTING_TOOL
        field, value = {"enum": TEAMS, "type": "string"}, rng.choice(TEAMS)
    else:
        name, description, argument = rng.choice(TOOLS)
        field, value = {"type": "string"}, thing
    schema = {"properties": {argument: field}, "required": [argument], "type": "object"}
    result = f"desk {rng.randint(10, 99)}"
    call = {"name": name, "arguments": {argument: value}}
    messages = [
        *_system(rng, HELP_DESK),
        _user(rng, thing),
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": call}]},
        {"role": "tool", "tool_call_id": "1", "content": result},
        {"role": "assistant", "content": f"Please go to {result}."},
    ]
    return messages, [
        {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}
    ]


def _system(rng: random.Random, *prompts: str) -> list[Message]:
    prompt = rng.choice([*prompts, None])
    return [] if prompt is None else [{"role": "system", "content": prompt}]


def _user(rng: random.Random, thing: str) -> Message:
    return {"role": "user", "content": rng.choice(SENTENCES).format(x=thing, v=rng.choice(STATES))}


def _turn(rng: random.Random, thing: str, reply: str) -> list[Message]:
    return [_user(rng, thing), {"role": "assistant", "content": reply}]
