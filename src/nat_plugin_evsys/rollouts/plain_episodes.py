"""Plain NAT trajectories: episodes without recorded calls.

The trajectory builder of this package records every token. An episode that somebody else built has texts, and logprobs
or none: its prompts are rendered by the policy's chat template, and a reply is taken only where its tokens are certain
enough to belong to the logprobs. Where they are not, ``retokenize`` takes the tokens of the reply's text.
"""

from __future__ import annotations

import re
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from nat.data_models.finetuning import EpisodeItem, EpisodeItemRole, Trajectory

from nat_plugin_evsys.calls import Call, DropReason, StopReason
from nat_plugin_evsys.errors import DataError
from nat_plugin_evsys.rollouts.episodes import MESSAGE_FIELDS, Message
from nat_plugin_evsys.rollouts.retokenized import Drift
from nat_plugin_evsys.rollouts.roles import OBSERVATIONS, validate_episode_order
from nat_plugin_evsys.rollouts.trajectories import CALLS_KEY

_TOKEN_ID = re.compile(r"token_id:(\d+)")


class Renderer(Protocol):
    """Messages -> token ids, by the model's chat template."""

    def render(self, messages: Any, tools: Any) -> list[int]:
        """Ids of a prompt, ending with the opening of an assistant turn."""
        ...

    def render_reply(self, message: Any) -> list[int]:
        """Ids of an assistant reply, with the end-of-turn token."""
        ...


def is_plain(trajectory: Trajectory) -> bool:
    """True for a trajectory without recorded calls whose assistant items have logprobs."""
    if CALLS_KEY in (trajectory.metadata or {}):
        return False
    return any(isinstance(item, EpisodeItem) and _sampled(item) for item in trajectory.episode)


def is_text(trajectory: Trajectory) -> bool:
    """True for a trajectory with replies, but neither recorded calls nor any logprobs."""
    if CALLS_KEY in (trajectory.metadata or {}) or is_plain(trajectory):
        return False
    return any(isinstance(item, EpisodeItem) and item.role is EpisodeItemRole.ASSISTANT for item in trajectory.episode)


def with_calls(
    trajectory: Trajectory,
    name: str,
    renderer: Renderer,
    *,
    tools: list[dict[str, Any]] | None = None,
    retokenize: bool = False,
    drift: Drift | None = None,
) -> Trajectory:
    """A copy with a call for every assistant item that has logprobs; the others are context.

    With ``retokenize``, an item whose tokens are unknown becomes a call with the tokens of its text; where no item has
    logprobs, all of them do.

    An item's logprobs are numbers, or OpenAI's entries (``{"token", "logprob"}``, also below ``content``). Entries
    ``token_id:<id>`` name the tokens. Otherwise they are those of the text, and there must be as many as logprobs,
    with or without the end-of-turn token. ``metadata["temperature"]`` is what the item was sampled at, 1 unless given,
    and ``metadata["policy_version"]`` the version that sampled it, 0 unless given.

    Args:
        name: what to call the trajectory in an error text.
        tools: those that the replies were offered, in OpenAI form.
        drift: is told of every reply whose tokens are named.

    Raises:
        DataError: role order, logprobs or text are wrong; names the item.
    """
    validate_episode_order(trajectory, name)
    messages: list[Message] = []
    calls: list[dict[str, Any]] = []
    every = retokenize and is_text(trajectory)
    for position, item in enumerate(trajectory.episode):
        assert isinstance(item, EpisodeItem)  # validated above
        message = _message(item)
        if item.role is EpisodeItemRole.ASSISTANT and (_sampled(item) or every):
            reading = Reading(f"{name}, item {position}", renderer, retokenize, drift or Drift())
            calls.append(_call(item, message, _Request(list(messages), tools or [], len(calls)), reading).to_dict())
        messages.append(message)
    return trajectory.model_copy(update={"metadata": {**(trajectory.metadata or {}), CALLS_KEY: calls}})


def _sampled(item: EpisodeItem) -> bool:
    return item.role is EpisodeItemRole.ASSISTANT and bool(_entries(item.logprobs))


def _entries(logprobs: Any) -> Sequence[Any]:
    """OpenAI's ``choice.logprobs`` holds its entries below ``content``."""
    below = logprobs.get("content") if isinstance(logprobs, Mapping) else getattr(logprobs, "content", logprobs)
    return below if isinstance(below, Sequence) and not isinstance(below, str) else ()


def _message(item: EpisodeItem) -> Message:
    role = item.role.value
    if item.role in OBSERVATIONS:
        role = "user" if item.role is EpisodeItemRole.ENVIRONMENT else "tool"
    kept = {key: value for key, value in (item.metadata or {}).items() if key in MESSAGE_FIELDS and value}
    return {"role": role, "content": item.content, **kept}


@dataclass(slots=True)
class RecordedRows:
    """Trajectories that all have recorded calls.

    Attributes:
        rows: one list per dataset row, as they came in.
        left_out: trajectories that are not among them, by reason.
        drift: what tokenising text again does, where that can be seen.
    """

    rows: list[list[Trajectory]]
    left_out: Counter[DropReason] = field(default_factory=Counter)
    drift: Drift = field(default_factory=Drift)


def recorded_rows(rows: list[list[Trajectory]], renderer: Renderer, *, retokenize: bool) -> RecordedRows:
    """Every trajectory with calls, by ``with_calls``; one of text alone is left out unless ``retokenize``.

    If there is nothing but text, it stays, for ``calls_of`` to refuse.

    Raises:
        DataError: see ``with_calls``.
    """
    result = RecordedRows(rows)
    every = [trajectory for row in rows for trajectory in row]
    if not retokenize and not all(map(is_text, every)):
        rows = [[trajectory for trajectory in row if not is_text(trajectory)] for row in rows]
        if texts := len(every) - sum(map(len, rows)):
            result.left_out[DropReason.TEXT_ONLY] = texts

    def recorded(trajectory: Trajectory, name: str) -> Trajectory:
        if is_plain(trajectory) or (retokenize and is_text(trajectory)):
            return with_calls(trajectory, name, renderer, retokenize=retokenize, drift=result.drift)
        return trajectory

    result.rows = [
        [recorded(each, f"trajectory {at} of group {group}") for at, each in enumerate(row)]
        for group, row in enumerate(rows)
    ]
    return result


@dataclass(frozen=True)
class _Request:
    """What an item answers."""

    messages: list[Message]
    tools: list[dict[str, Any]]
    number: int


@dataclass(frozen=True)
class Reading:
    """How an item is read: its name in messages, and see ``with_calls``."""

    where: str
    renderer: Renderer
    retokenize: bool
    drift: Drift


def _call(item: EpisodeItem, reply: Message, request: _Request, reading: Reading) -> Call:
    tokens = reply_tokens(_entries(item.logprobs), reply, reading)
    sampled = item.metadata or {}
    return Call(
        call_id=f"episode-{uuid.uuid4().hex}",
        index=0,
        run_id=None,
        step_id=None,
        policy_version=int(sampled.get("policy_version", 0)),
        prompt_ids=reading.renderer.render(request.messages, request.tools or None),
        output_ids=tokens.ids,
        logprobs=tokens.logprobs,
        stop_reason=tokens.stop_reason,
        temperature=float(sampled.get("temperature", 1.0)),
        top_p=1.0,
        messages=request.messages,
        tools=request.tools,
        reply=reply,
        sequence=request.number,
        retokenized=tokens.retokenized,
        logprobs_unknown=tokens.logprobs_unknown,
    )


@dataclass(frozen=True)
class ReplyTokens:
    """What was sampled; see ``Call``."""

    ids: list[int]
    logprobs: list[float]
    stop_reason: StopReason
    retokenized: bool = False
    logprobs_unknown: bool = False


def reply_tokens(
    entries: Sequence[Any], reply: Message, reading: Reading, token_ids: Sequence[int] = ()
) -> ReplyTokens:
    """The tokens of a reply.

    Args:
        entries: its logprobs in any of the forms of ``with_calls``; none where there are none.
        token_ids: its tokens, where they are recorded beside the logprobs or without any.

    Raises:
        DataError: they are no logprobs, or they do not fit the text and ``retokenize`` is off.
    """
    try:
        logprobs = [float(_part(entry, "logprob")) for entry in entries]
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{reading.where}: logprobs are numbers, or OpenAI's entries with token and logprob: {error}"
        ) from error
    named = [_TOKEN_ID.fullmatch(str(_part(entry, "token"))) for entry in entries]
    rendered = reading.renderer.render_reply(reply)
    ids = list(token_ids) or ([int(match[1]) for match in named if match] if all(named) else [])
    if ids:
        reading.drift.compare(ids, rendered)
    if ids and len(ids) == len(logprobs):
        return ReplyTokens(ids, logprobs, "stop" if ids[-1] == rendered[-1] else "length")
    if entries and len(rendered) - len(logprobs) in (0, 1):
        return ReplyTokens(rendered[: len(logprobs)], logprobs, "stop" if len(rendered) == len(logprobs) else "length")
    if ids:
        end: StopReason = "stop" if ids[-1] == rendered[-1] else "length"
        return ReplyTokens(ids, [0.0] * len(ids), end, logprobs_unknown=True)
    if reading.retokenize:
        return ReplyTokens(rendered, [0.0] * len(rendered), "stop", retokenized=True, logprobs_unknown=True)
    raise DataError(
        f"{reading.where}: {len(logprobs)} logprobs for a text of {len(rendered) - 1} tokens and the end of the turn; "
        "it was sampled in other tokens. Give token_id:<id> entries, use evsys_trajectory_builder, or set the "
        "adapter's retokenize: true to train on the tokens of the text"
    )


def _part(entry: Any, name: str) -> Any:
    """A field of an OpenAI entry, a dict or an object; of a bare number, the number itself."""
    if isinstance(entry, Mapping):
        return entry.get(name)
    return getattr(entry, name, entry)
