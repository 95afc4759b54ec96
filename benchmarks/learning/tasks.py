"""The tasks of the comparison: rows, system prompt, and the reward of a reply. Everybody trains on these.

reasoning-gym is no dependency of this package. It is imported from ``benchmarks/out/reasoning-gym``; see README.md.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
GYM = ROOT / "benchmarks" / "out" / "reasoning-gym"
TRAIN, HELDOUT = 32, 32
"""Rows of a generated task."""

Row = dict[str, Any]
"""``{"id", "question", "answer"}``, all text."""


@dataclass(frozen=True)
class Task:
    """What is asked, and what a reply earns.

    Attributes:
        max_tokens: of each reply.
        reward: of a row and the text of its (last) reply, from 0 to 1.
        tool: what the tool says to a first reply, after which there is a second; None for one reply.
    """

    name: str
    system: str
    max_tokens: int
    train: list[Row]
    heldout: list[Row]
    reward: Callable[[Row, str], float]
    tool: Callable[[Row, str], str] | None = None

    def messages(self, row: Row) -> list[dict[str, str]]:
        """What a rollout begins with."""
        return [{"role": "system", "content": self.system}, {"role": "user", "content": row["question"]}]


def task(name: str) -> Task:
    """The task of that name, of ``NAMES``."""
    return {"helpdesk": helpdesk, "price_list": price_list}.get(name, lambda: gym(name))()


@cache
def helpdesk() -> Task:
    """The quickstart's tickets: name the right team and no other."""
    teams = ("network", "printing", "accounts", "payroll")
    data = ROOT / "examples" / "helpdesk" / "data"

    def reward(row: Row, reply: str) -> float:
        return float(_named(teams, reply) == [row["answer"]])

    return Task(
        "helpdesk",
        "You are a help desk. Answer with exactly one word, the team that should handle the ticket, in lower case: "
        "network, printing, accounts or payroll.",
        8,
        json.loads((data / "train.json").read_text()),
        json.loads((data / "heldout.json").read_text()),
        reward,
    )


@cache
def price_list() -> Task:
    """Two turns and a tool: look two goods up in a price list, then say which is cheaper."""
    goods = ("apples", "bread", "butter", "cheese", "coffee", "eggs", "flour", "honey", "milk", "rice", "sugar", "tea")
    prices = {good: 2 + 5 * number % 23 for number, good in enumerate(goods)}
    pairs = [(left, right) for left in goods for right in goods if left != right]
    rows = [
        {
            "id": f"{left}-{right}",
            "question": f"Which costs less, {left} or {right}?",
            "answer": min(left, right, key=prices.__getitem__),
        }
        for left, right in pairs[:: len(pairs) // (TRAIN + HELDOUT)]
    ]

    def tool(_: Row, reply: str) -> str:
        named = _named(goods, reply)
        if not reply.strip().lower().startswith("price") or not named:
            return "No price was asked for. Reply with one word."
        return "; ".join(f"{good}: {prices[good]}" for good in named[:2]) + ". Reply with one word."

    def reward(row: Row, reply: str) -> float:
        return float(_named(goods, reply) == [row["answer"]])

    return Task(
        "price_list",
        "To learn prices, reply with: price A, B. When you have been told the prices, reply with the cheaper good, "
        "one word.",
        12,
        rows[0::2][:TRAIN],
        rows[1::2][:HELDOUT],
        reward,
        tool,
    )


def _named(words: Sequence[str], reply: str) -> list[str]:
    """Those of the words that a reply has, in their order."""
    return [word for word in words if re.search(rf"\b{word}\b", reply.lower())]


GYM_TASKS: dict[str, dict[str, Any]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
    "gcd": {"min_numbers": 2, "max_numbers": 2, "min_value": 1, "max_value": 20},
    "products": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
}
"""reasoning-gym's generators and their settings. Of each the base model solves 9 % to 19 %."""

EXACT = ("gcd",)
"""Tasks where nothing but the right answer counts: reasoning-gym's scorer gives 0.5 for 12 where 1 or 2 is right."""

NAMES = ("helpdesk", *GYM_TASKS, "price_list")


@cache
def gym(name: str) -> Task:
    """One of reasoning-gym's, with its own scorer, which is given the last number of a reply."""
    if str(GYM) not in sys.path:
        sys.path.append(str(GYM))
    import reasoning_gym

    dataset = reasoning_gym.create_dataset(name, size=4 * (TRAIN + HELDOUT), seed=7, **GYM_TASKS[name])
    once = {entry["question"]: entry for entry in dataset}
    entries = list(once.values())[: TRAIN + HELDOUT]
    rows = [
        {"id": f"{name}-{number}", "question": entry["question"], "answer": entry["answer"]}
        for number, entry in enumerate(entries)
    ]

    def reward(row: Row, reply: str) -> float:
        numbers = re.findall(r"-?\d+", reply)
        score = float(dataset.score_answer(numbers[-1] if numbers else None, once[row["question"]]))
        return score if name not in EXACT else float(score == 1.0)

    return Task(name, "Reply with the answer alone.", 24, rows[:TRAIN], rows[TRAIN:], reward)
