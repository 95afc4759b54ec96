"""An attempt in ATIF, NAT's interchange format of trajectories, with the exact tokens of every sampled reply.

What ATIF has no field for is in its ``extra`` dicts: of the trajectory what the caller knows; of a sampled step
``call_id``, ``choice``, ``conversation``, ``policy_version``, ``temperature``, ``top_p``, ``stop_reason`` and
``dropped``; of such a step's metrics ``token_texts``, ``advantage`` and ``learner_logprobs``, the latter from the
start of the optimizer step that trained on it. Prompt ids are left out: a reply's context is the messages before it.
An image of a message is named by the path of its file, beside the trajectories (``image_path``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from nat.atif import (
    Agent,
    ContentPart,
    FinalMetrics,
    ImageSource,
    Metrics,
    Observation,
    ObservationResult,
    Step,
    ToolCall,
    Trajectory,
)

from nat_plugin_evsys.call_images import CallImage, image_path, referred
from nat_plugin_evsys.calls import Call, CallFate, CallKey
from nat_plugin_evsys.rollouts.attempts import Attempt
from nat_plugin_evsys.rollouts.episodes import Message, message_chains, new_messages, text_of

TokenTexts = Callable[[Sequence[int]], list[str]]
"""The text of each token id; joined they are the text of all."""

_DIGITS = 5
_IMPOSSIBLE = -9999.0
"""What OpenAI writes for a log-probability of minus infinity, which JSON has no word for."""

_SOURCES: dict[str, Literal["system", "user", "agent"]] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "agent",
}


def atif_trajectory(
    attempt: Attempt,
    fates: Mapping[CallKey, CallFate],
    texts: TokenTexts,
    *,
    session: str,
    name: str,
    agent: str,
    model: str,
    extra: dict[str, Any],
) -> Trajectory:
    """The attempt in ATIF.

    Conversations follow one another, as in ``episode_of``. A tool's result is the observation of the step that called
    the tool. Assistant messages that were not sampled here (few-shot examples, history) are marked as copied context.

    Args:
        fates: what training did with the calls; those without one were not trained on.
        session: the run's name; ``name`` is the trajectory's own.
        agent: the workflow's type; its version is that of the policy that ended the attempt.
        model: the base model.
        extra: JSON-ready facts about the attempt.
    """
    images = {image["sha256"]: image for call in attempt.calls for image in call.images}
    steps = _Steps(fates, texts, images)
    calls = sorted(attempt.calls, key=lambda call: (call.sequence, call.index))
    for number, chain in enumerate(message_chains(calls)):
        steps.add_conversation(number, chain)
    return Trajectory(
        session_id=session,
        trajectory_id=name,
        agent=Agent(
            name=agent,
            version=f"policy-{calls[-1].policy_version}" if calls else "policy",
            model_name=model,
            tool_definitions=next((call.tools for call in calls if call.tools), None),
        ),
        steps=steps.steps,
        final_metrics=FinalMetrics(
            total_prompt_tokens=sum(len(call.prompt_ids) for call in calls),
            total_completion_tokens=sum(len(call.output_ids) for call in calls),
            total_steps=len(steps.steps),
        ),
        extra=extra,
    )


class _Steps:
    """Collects the steps of a trajectory."""

    def __init__(self, fates: Mapping[CallKey, CallFate], texts: TokenTexts, images: Mapping[str, CallImage]) -> None:
        self.steps: list[Step] = []
        self._fates = fates
        self._texts = texts
        self._images = images
        self._first = 0

    def add_conversation(self, number: int, chain: list[Call]) -> None:
        """The messages and replies of one conversation, in their order."""
        self._first = len(self.steps)
        parent: Call | None = None
        for call in chain:
            for message in new_messages(call, parent):
                self._add_message(message)
            self._add_reply(call, number)
            parent = call

    def _add_message(self, message: Message) -> None:
        role, content = str(message.get("role")), self._content(message.get("content"))
        if role in ("tool", "function") and self._observe(content, message.get("tool_call_id")):
            return
        source = _SOURCES.get(role, "user")
        copied = source == "agent"
        self.steps.append(
            Step(
                step_id=len(self.steps) + 1,
                source=source,
                message=content,
                tool_calls=_tool_calls(message) if copied else None,
                is_copied_context=True if copied else None,
                extra=None if role in _SOURCES else {"role": role},
            )
        )

    def _content(self, content: Any) -> str | list[ContentPart]:
        """A message's text; with its images, parts that name their files."""
        if not isinstance(content, list) or not any(referred(part) for part in content):
            return text_of(content)
        return [self._part(part) for part in content]

    def _part(self, part: dict[str, Any]) -> ContentPart:
        key = referred(part)
        if key is None:
            return ContentPart(type="text", text=text_of([part]))
        image = self._images[key]
        kind: Literal["image/png", "image/jpeg"] = "image/png" if image["format"] == "png" else "image/jpeg"
        return ContentPart(type="image", source=ImageSource(media_type=kind, path=image_path(image)))

    def _observe(self, content: str | list[ContentPart], call_id: str | None) -> bool:
        """Give a tool's result to the step of this conversation that called it, or to its last agent's step."""
        agents = [step for step in self.steps[self._first :] if step.source == "agent"]
        callers = [step for step in agents if any(call.tool_call_id == call_id for call in step.tool_calls or ())]
        if not agents:
            return False
        step = callers[-1] if callers else agents[-1]
        step.observation = step.observation or Observation()
        source = call_id if callers else None
        step.observation.results.append(ObservationResult(source_call_id=source, content=content))
        return True

    def _add_reply(self, call: Call, conversation: int) -> None:
        fate = self._fates.get(call.key, CallFate())
        learner = fate.learner_logprobs
        self.steps.append(
            Step(
                step_id=len(self.steps) + 1,
                source="agent",
                message=text_of(call.reply.get("content")),
                tool_calls=_tool_calls(call.reply),
                metrics=Metrics(
                    prompt_tokens=len(call.prompt_ids),
                    completion_tokens=len(call.output_ids),
                    completion_token_ids=call.output_ids,
                    logprobs=_rounded(call.logprobs),
                    extra={
                        "token_texts": self._texts(call.output_ids),
                        "advantage": fate.advantage,
                        "learner_logprobs": None if learner is None else _rounded_where_known(learner),
                    },
                ),
                llm_call_count=1,
                extra={
                    "call_id": call.call_id,
                    "choice": call.index,
                    "conversation": conversation,
                    "policy_version": call.policy_version,
                    "temperature": call.temperature,
                    "top_p": call.top_p,
                    "stop_reason": call.stop_reason,
                    "history": call.history,
                    "malformed_calls": call.malformed_calls,
                    "functions": call.functions or None,
                    "dropped": fate.dropped,
                },
            )
        )


def _tool_calls(message: Message) -> list[ToolCall] | None:
    calls = []
    for index, call in enumerate(message.get("tool_calls") or []):
        function = call.get("function") or {}
        arguments, raw = _arguments(function.get("arguments"))
        calls.append(
            ToolCall(
                tool_call_id=str(call.get("id") or f"call-{index}"),
                function_name=str(function.get("name")),
                arguments=arguments,
                extra=None if raw is None else {"raw_arguments": raw},
            )
        )
    return calls or None


def _arguments(written: Any) -> tuple[dict[str, Any], str | None]:
    """The arguments of a tool call; if they are not a JSON object, none and the text as written."""
    try:
        arguments = json.loads(written) if isinstance(written, str) else written
    except json.JSONDecodeError:
        arguments = None
    return (arguments, None) if isinstance(arguments, dict) else ({}, str(written))


def _rounded(logprobs: Sequence[float]) -> list[float]:
    kept: list[float] = np.maximum(logprobs, _IMPOSSIBLE).round(_DIGITS).tolist()
    return kept


def _rounded_where_known(logprobs: Sequence[float | None]) -> list[float | None]:
    known = iter(_rounded([value for value in logprobs if value is not None]))
    return [None if value is None else next(known) for value in logprobs]
