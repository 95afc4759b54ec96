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
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nat_plugin_evsys.report.contents import content_text
from nat_plugin_evsys.report.questions import question_text
from nat_plugin_evsys.runs.rollouts import Collection, CollectionKind, RolloutFacts, RolloutFiles

if TYPE_CHECKING:
    from nat.atif import Metrics, Step, Trajectory

_COMPRESSION = 9
_MILLI = 1000


@dataclass(frozen=True, slots=True)
class Block:
    """A collection of rollouts, ready to be embedded.

    Attributes:
        data: base64.
        rows, rollouts: their numbers.
    """

    collection: Collection
    data: str
    rows: int
    rollouts: int


class Blocks:
    """The blocks of one run. Made ones are held while they are embedded, so that a running process, which writes its
    report over and over, makes each once; of the others only the size is kept, and the rewards of measurements.
    """

    def __init__(self, files: RolloutFiles) -> None:
        self._files = files
        self._made: dict[Collection, Block] = {}
        self._sizes: dict[Collection, int] = {}
        self._rewards: dict[Collection, dict[str, float]] = {}
        self._growth: dict[CollectionKind, float] = {}

    def collections(self) -> list[Collection]:
        """The collections on disk."""
        return self._files.collections()

    def size(self, collection: Collection) -> float:
        """Characters of a block's data: an estimate if it was never made, and 0 while none of its kind was.

        Blocks of a kind are about as large as their files; the largest in relation to its file is taken as the rule.
        """
        if collection in self._sizes:
            return self._sizes[collection]
        return self._growth.get(collection.kind, 0.0) * self._files.path(collection).stat().st_size

    def block(self, collection: Collection) -> Block:
        """The block of a collection.

        Raises:
            DataError: the file cannot be read.
        """
        if collection not in self._made:
            self._made[collection] = block = make_block(collection, self._files.lines(collection))
            self._sizes[collection] = len(block.data)
            growth = len(block.data) / max(1, self._files.path(collection).stat().st_size)
            self._growth[collection.kind] = max(growth, self._growth.get(collection.kind, 0.0))
        return self._made[collection]

    def hold(self, collections: Container[Collection]) -> None:
        """Forget the blocks of all others."""
        self._made = {collection: block for collection, block in self._made.items() if collection in collections}

    def rewards(self, collection: Collection) -> dict[str, float]:
        """Mean reward of each row of a measurement, of its scored attempts; raises as ``block``."""
        if collection not in self._rewards:
            self._rewards[collection] = row_rewards(self._files.lines(collection))
        return self._rewards[collection]


def row_rewards(lines: Iterable[str]) -> dict[str, float]:
    """Mean reward of each row of the ATIF trajectories in ``lines``, of its scored attempts."""
    rewards: dict[str, list[float]] = {}
    for line in lines:
        facts = RolloutFacts.of(json.loads(line).get("extra"))
        if facts.reward is not None:
            rewards.setdefault(facts.row_id, []).append(facts.reward)
    return {row_id: sum(row) / len(row) for row_id, row in rewards.items()}


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
        len(rows),
        sum(len(row["attempts"]) for row in rows.values()),
    )


def _row(facts: RolloutFacts) -> dict[str, Any]:
    asked = question_text(facts.question)
    title = {} if asked is None else {"title": asked}
    return {"id": facts.row_id, "question": facts.question, **title, "expected": facts.expected, "attempts": []}


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
