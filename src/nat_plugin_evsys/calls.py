"""The nouns that several rooms share. Standard library only.

A *call* is one LLM request with its exact tokens. Everything that is trained on comes from calls; text is never
tokenised again.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields
from typing import Any, Literal

StopReason = Literal["stop", "length"]
"""``stop``: a stop token or stop string ended the sequence. ``length``: max_tokens or the context did."""

RunKind = Literal["rollout", "evaluation"]
"""``rollout`` calls may be trained on; ``evaluation`` calls (validation) never are."""

RUN_ID_HEADER = "x-evsys-run-id"
STEP_ID_HEADER = "x-evsys-step-id"


@dataclass(frozen=True, slots=True)
class Call:
    """One recorded LLM request: what the model read, what it sampled, and from which distribution.

    Attributes:
        call_id: the completion id that the client saw (``chatcmpl-…``); with ``n > 1`` one Call per choice.
        index: the choice's index within the completion.
        run_id: NAT's workflow_run_id, or None for a call made outside any workflow run.
        step_id: UUID of NAT's LLM_START step that made the call, or None.
        policy_version: version of the adapter that sampled *all* of ``output_ids``.
        prompt_ids: token ids that the model read, length P.
        output_ids: sampled token ids, length T, including the stop token.
        logprobs: log-probability of each output id under the distribution that was sampled, length T.
        stop_reason: why sampling ended.
        temperature, top_p: what was sampled with.
        messages: the request's messages in OpenAI form.
        tools: the request's tools in OpenAI form.
        reply: the assistant message that was returned, in OpenAI form.
        sequence: arrival order within the recorder.
    """

    call_id: str
    index: int
    run_id: str | None
    step_id: str | None
    policy_version: int
    prompt_ids: list[int]
    output_ids: list[int]
    logprobs: list[float]
    stop_reason: StopReason
    temperature: float
    top_p: float
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    reply: dict[str, Any]
    sequence: int

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict of the same lists; ``Call(**d)`` gives the call back."""
        return {each.name: getattr(self, each.name) for each in fields(self)}


@dataclass(slots=True)
class CallTally:
    """Where every call went: ``calls == trained + sum(dropped.values())`` once an epoch is done."""

    calls: int = 0
    trained: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def add(self, other: CallTally) -> None:
        """Add another tally to this one, in place."""
        self.calls += other.calls
        self.trained += other.trained
        self.dropped.update(other.dropped)

    def drop(self, reason: str, calls: int) -> None:
        """Count calls that will not be trained on, under a named reason."""
        if calls:
            self.dropped[reason] += calls
