"""A finding: something about a run that a person should look at, as a sentence with examples.

The console says each finding once, when it first holds; metrics.jsonl keeps it in the row of every epoch in which it
holds; summary.json and the text that ends a run name it again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from textwrap import wrap
from typing import Any

from nat_plugin_evsys.errors import visible
from nat_plugin_evsys.report.replies import Reply

KEY = "findings"
"""Where an epoch's row of metrics.jsonl keeps its findings."""

WIDTH = 100
"""Columns of a finding's text; examples keep their lines whole."""


class FindingId(StrEnum):
    """The kinds of findings, with stable names."""

    SAME_REWARD = "same_reward"
    """Every reward of the run so far is the same."""
    NO_SIGNAL = "no_signal"
    """In an epoch no row has attempts with different rewards, and nothing was trained."""
    ONE_ANSWER = "one_answer"
    """Rows that want different answers get the same one."""
    SEVERAL_ANSWERS = "several_answers"
    """Replies are rewarded although they also name what other rows want."""
    HELDOUT_SEVERAL = "heldout_several"
    """The same of most rewarded replies to held-out rows: the held-out reward does not measure the task."""
    FALLEN = "fallen"
    """The reward has fallen back to about what it was in the first epoch."""
    CUT_OFF = "cut_off"
    """Replies end at the token limit."""
    SHRUNK = "shrunk"
    """The reward rose while the replies shrank to nothing."""
    MOVED_FAR = "moved_far"
    """An epoch's steps made the policy another one: the learning rate is too high."""
    LOW_ENTROPY = "low_entropy"
    """The policy has nearly stopped trying alternatives although better rewards exist."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that a person should look at.

    Attributes:
        epoch: the epoch in which it was found, counted from 1.
        sentence: what was seen.
        advice: what to do about it.
        examples: replies that show it, the first ones of the epoch.
        collapse: whether it means that the policy has lost what it had learned.
    """

    id: FindingId
    epoch: int
    sentence: str
    advice: str
    examples: list[Reply] = field(default_factory=list)
    collapse: bool = False

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; ``from_dict`` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Finding:
        """The finding that ``to_dict`` wrote."""
        examples = [Reply(**reply) for reply in data["examples"]]
        return cls(
            FindingId(data["id"]),
            data["epoch"],
            data["sentence"],
            data["advice"],
            examples,
            data.get("collapse", False),
        )


def findings_of(rows: Iterable[Mapping[str, Any]]) -> list[tuple[Finding, list[int]]]:
    """The findings of a run's rows of metrics.jsonl: each once, as it was first found, with the epochs that have it."""
    found: dict[str, tuple[Finding, list[int]]] = {}
    for row in rows:
        for data in row.get(KEY) or ():
            found.setdefault(data["id"], (Finding.from_dict(data), []))[1].append(row["epoch"])
    return list(found.values())


def quoted(text: str, limit: int = 160) -> str:
    """``text`` on one line in quotes, shortened in the middle if longer than ``limit`` characters."""
    if len(text) > limit:
        half = (limit - 3) // 2
        text = f"{text[:half]} … {text[-half:]}"
    return visible(json.dumps(text, ensure_ascii=False))


def finding_text(finding: Finding, examples: int | None = None) -> str:
    """The finding as lines for a terminal: what was seen, what to do, and its examples.

    ``! Every reward of epoch 1 is 0.000 …`` / ``  Compare the replies …`` / ``  row 3 asks "…" and wants "…"`` /
    ``    reply "…": reward 0.000, mode: exact``

    Args:
        examples: most examples to show; all by default.
    """
    lines = [
        *wrap(finding.sentence, WIDTH, initial_indent="! ", subsequent_indent="  "),
        *wrap(finding.advice, WIDTH, initial_indent="  ", subsequent_indent="  "),
    ]
    for reply in finding.examples[:examples]:
        wants = "" if reply.expected is None else f" and wants {quoted(reply.expected)}"
        lines.append(f"  row {reply.row} asks {quoted(reply.question)}{wants}")
        reward = "no reward" if reply.reward is None else f"reward {reply.reward:.3f}"
        lines.append(f"    reply {quoted(reply.text)}: {', '.join(filter(None, (reward, reply.verdict)))}")
    return visible("\n".join(lines))
