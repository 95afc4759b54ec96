"""What ``builtin/tiny`` knows before anybody finetunes it: half a minute of full-parameter training on made-up chats.

A low-rank adapter over purely random weights needs thousands of steps to find the one word of a prompt that matters. So
the builtin model is first taught what any pretrained model brings along, and nothing of the task that the quickstart
trains:

- *reading*: the reply names the thing that the user's sentence is about;
- *sorting*: at a help desk the reply is a team. Which team handles ``FAMILIAR`` things is fixed; for the ``TICKET``
  things it is drawn at random each time, so the model answers those with an even guess;
- *tools*: a Qwen/Hermes-style tool call with the thing as its argument (or, for a tool that takes a team, one drawn at
  random), and an answer from the tool's result.

The chats are a function of the seed alone. The weights are the same again on one machine; another number of threads or
another processor rounds differently.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
PROMPT_WEIGHT = 0.1
"""Weight of a prompt's tokens in the loss; those of a reply weigh 1."""


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


def pretrain(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, seed: int, steps: int, batch_tokens: int, lr: float
) -> None:
    """Train all weights in place with AdamW; the learning rate warms up over 20 steps and falls in the last third.

    Args:
        batch_tokens: padded tokens per step, at the most.
    """
    import torch

    rng = random.Random(seed)
    batches = _batches([_encode(tokenizer, *chat) for chat in chats(seed, 2500)], batch_tokens)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    order: list[int] = []
    model.train()
    for step in range(steps):
        if not order:
            order = rng.sample(range(len(batches)), len(batches))
        rate = lr * min(1.0, (step + 1) / 20) * min(1.0, (steps - step) / (0.3 * steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = _loss(model, *_pad(batches[order.pop()]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    model.zero_grad()


def _encode(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: list[Any] | None
) -> tuple[list[int], list[float]]:
    """``(ids, weights)`` of a chat, both of its length."""

    def ids(upto: int, prompt: bool) -> list[int]:
        text = tokenizer.apply_chat_template(messages[:upto], tools=tools, tokenize=False, add_generation_prompt=prompt)
        found: list[int] = tokenizer(text)["input_ids"]
        return found

    full = ids(len(messages), False)
    weights = [PROMPT_WEIGHT] * len(full)
    for position, message in enumerate(messages):
        if message["role"] == "assistant":
            start, stop = len(ids(position, True)), len(ids(position + 1, False)) - 1  # the last is the line end
            weights[start:stop] = [1.0] * (stop - start)
    return full, weights


def _batches(rows: list[tuple[list[int], list[float]]], budget: int) -> list[list[tuple[list[int], list[float]]]]:
    """Rows of like length together, as many as fit the budget when padded."""
    batches: list[list[tuple[list[int], list[float]]]] = [[]]
    for row in sorted(rows, key=lambda row: len(row[0])):
        if batches[-1] and len(row[0]) * (len(batches[-1]) + 1) > budget:
            batches.append([])
        batches[-1].append(row)
    return batches


def _pad(rows: list[tuple[list[int], list[float]]]) -> tuple[Tensor, Tensor]:
    """``ids (B, T)`` and ``weights (B, T)``, padded with zeros on the right."""
    import torch

    length = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in rows])
    weights = torch.tensor([weights + [0.0] * (length - len(weights)) for _, weights in rows])
    return ids, weights


def _loss(model: PreTrainedModel, ids: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean negative log-likelihood of the next token."""
    import torch.nn.functional as F

    logits = model(ids).logits[:, :-1]
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return (losses * weights[:, 1:].flatten()).sum() / weights[:, 1:].sum()
