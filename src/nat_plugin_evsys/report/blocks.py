"""Rollouts as the report's page embeds them: one compressed block per collection, decoded on demand.

A block is the base64 of gzip of JSON ``{"rows": [row, …]}``. A row has ``id``, ``question``, ``title`` (what it asks,
where ``question`` is an object or JSON of one), ``expected`` and its ``attempts``; an attempt its facts and ``steps``;
a step what was said and, where it was sampled, its ``tokens``: texts ``t``, ids ``i``, and in thousandths of a nat the
logprobs at sampling ``p`` and the learner's ``l`` (null at a token that a grammar forced). Fields without a value are
left out.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nat_plugin_evsys.report.contents import content_text
from nat_plugin_evsys.report.questions import question_text
from nat_plugin_evsys.runs.rollouts import Collection, RolloutFacts, RolloutFiles

if TYPE_CHECKING:
    from nat.atif import Metrics, Step, Trajectory

_COMPRESSION = 9
_MILLI = 1000


@dataclass(frozen=True, slots=True)
class Block:
    """A collection of rollouts, ready to be embedded.

    Attributes:
        data: base64.
        rewards: mean reward of each row, of its scored attempts.
        rows, rollouts: their numbers.
    """

    collection: Collection
    data: str
    rewards: dict[str, float]
    rows: int
    rollouts: int


class Blocks:
    """The blocks of one run. Each is made once, however often the report is written: a running process writes every
    collection once.
    """

    def __init__(self, files: RolloutFiles) -> None:
        self._files = files
        self._made: dict[Collection, Block] = {}

    def all(self) -> list[Block]:
        """The blocks of all collections on disk.

        Raises:
            DataError: a file cannot be read.
        """
        return [self._block(collection) for collection in self._files.collections()]

    def _block(self, collection: Collection) -> Block:
        if collection not in self._made:
            self._made[collection] = make_block(collection, self._files.lines(collection))
        return self._made[collection]


def make_block(collection: Collection, lines: Iterable[str]) -> Block:
    """The block of the ATIF trajectories in ``lines``."""
    from nat.atif import Trajectory

    rows: dict[str, dict[str, Any]] = {}
    for line in lines:
        trajectory = Trajectory.model_validate_json(line)
        facts = RolloutFacts.of(trajectory.extra)
        row = rows.setdefault(facts.row_id, _row(facts))
        row["attempts"].append(_attempt(facts, trajectory))
    text = json.dumps({"rows": list(rows.values())}, ensure_ascii=False, separators=(",", ":"))
    return Block(
        collection,
        base64.b64encode(gzip.compress(text.encode(), _COMPRESSION, mtime=0)).decode(),
        {row_id: mean for row_id, row in rows.items() if (mean := _mean_reward(row)) is not None},
        len(rows),
        sum(len(row["attempts"]) for row in rows.values()),
    )


def _row(facts: RolloutFacts) -> dict[str, Any]:
    asked = question_text(facts.question)
    title = {} if asked is None else {"title": asked}
    return {"id": facts.row_id, "question": facts.question, **title, "expected": facts.expected, "attempts": []}


def _mean_reward(row: dict[str, Any]) -> float | None:
    rewards = [attempt["reward"] for attempt in row["attempts"] if "reward" in attempt]
    return sum(rewards) / len(rewards) if rewards else None


def _attempt(facts: RolloutFacts, trajectory: Trajectory) -> dict[str, Any]:
    return _present(
        number=facts.attempt,
        reward=facts.reward,
        output=facts.output,
        reasoning=facts.reasoning,
        error=facts.error,
        dropped=facts.dropped,
        advantage=facts.advantage,
        versions=list(facts.policy_versions),
        seconds=facts.seconds,
        steps=[_step(step) for step in trajectory.steps],
    )


def _step(step: Step) -> dict[str, Any]:
    extra = step.extra or {}
    return _present(
        role=extra.get("role", "assistant" if step.source == "agent" else step.source),
        text=content_text(step.message),
        copied=step.is_copied_context,
        calls=list(_calls(step)) or None,
        results=list(_loose_results(step)) or None,
        conversation=extra.get("conversation") or None,
        version=extra.get("policy_version"),
        cut=extra.get("stop_reason") == "length" or None,
        dropped=extra.get("dropped"),
        advantage=None if step.metrics is None else (step.metrics.extra or {}).get("advantage"),
        tokens=None if step.metrics is None else _tokens(step.metrics),
    )


def _calls(step: Step) -> Iterator[dict[str, Any]]:
    results = step.observation.results if step.observation else []
    for call in step.tool_calls or ():
        answers = [content_text(result.content) for result in results if result.source_call_id == call.tool_call_id]
        yield {
            "name": call.function_name,
            "arguments": (call.extra or {}).get("raw_arguments", call.arguments),
            "results": answers,
        }


def _loose_results(step: Step) -> Iterator[Any]:
    """Tool outputs that belong to no call of the step."""
    for result in step.observation.results if step.observation else ():
        if result.source_call_id is None:
            yield content_text(result.content)


def _tokens(metrics: Metrics) -> dict[str, Any]:
    extra = metrics.extra or {}
    learner = extra.get("learner_logprobs")
    return _present(
        t=extra.get("token_texts"),
        i=metrics.completion_token_ids,
        p=[round(_MILLI * value) for value in metrics.logprobs or ()],
        l=None if learner is None else [None if value is None else round(_MILLI * value) for value in learner],
    )


def _present(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
