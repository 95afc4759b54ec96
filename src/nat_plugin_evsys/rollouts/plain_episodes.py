"""Plain NAT trajectories: episodes whose assistant items have logprobs, but no recorded calls.

The trajectory builder of this package records every token. An episode that somebody else built has texts and logprobs:
its prompts are rendered by the policy's chat template, and a reply is taken only where its tokens are certain enough to
belong to the logprobs.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from nat.data_models.finetuning import EpisodeItem, EpisodeItemRole, Trajectory

from nat_plugin_evsys.calls import Call, StopReason
from nat_plugin_evsys.errors import DataError
from nat_plugin_evsys.rollouts.episodes import MESSAGE_FIELDS, Message
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


def with_calls(
    trajectory: Trajectory, name: str, renderer: Renderer, *, tools: list[dict[str, Any]] | None = None
) -> Trajectory:
    """A copy with a call for every assistant item that has logprobs; the others are context.

    An item's logprobs are numbers, or OpenAI's entries (``{"token", "logprob"}``, also below ``content``). Entries
    ``token_id:<id>`` name the tokens. Otherwise they are those of the text, and there must be as many as logprobs,
    with or without the end-of-turn token. ``metadata["temperature"]`` is what the item was sampled at, 1 unless given.

    Args:
        name: what to call the trajectory in an error text.
        tools: those that the replies were offered, in OpenAI form.

    Raises:
        DataError: role order, logprobs or text are wrong; names the item.
    """
    validate_episode_order(trajectory, name)
    messages: list[Message] = []
    calls: list[dict[str, Any]] = []
    for position, item in enumerate(trajectory.episode):
        assert isinstance(item, EpisodeItem)  # validated above
        message = _message(item)
        if _sampled(item):
            where = f"{name}, item {position}"
            request = _Request(list(messages), tools or [], len(calls))
            calls.append(_call(item, message, request, where, renderer).to_dict())
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


@dataclass(frozen=True)
class _Request:
    """What an item answers."""

    messages: list[Message]
    tools: list[dict[str, Any]]
    number: int


def _call(item: EpisodeItem, reply: Message, request: _Request, where: str, renderer: Renderer) -> Call:
    ids, logprobs, stop_reason = _tokens(item, reply, where, renderer)
    return Call(
        call_id=f"episode-{uuid.uuid4().hex}",
        index=0,
        run_id=None,
        step_id=None,
        policy_version=0,
        prompt_ids=renderer.render(request.messages, request.tools or None),
        output_ids=ids,
        logprobs=logprobs,
        stop_reason=stop_reason,
        temperature=float((item.metadata or {}).get("temperature", 1.0)),
        top_p=1.0,
        messages=request.messages,
        tools=request.tools,
        reply=reply,
        sequence=request.number,
    )


def _tokens(
    item: EpisodeItem, reply: Message, where: str, renderer: Renderer
) -> tuple[list[int], list[float], StopReason]:
    entries = _entries(item.logprobs)
    try:
        logprobs = [float(_part(entry, "logprob")) for entry in entries]
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{where}: logprobs are numbers, or OpenAI's entries with token and logprob: {error}"
        ) from error
    named = [_TOKEN_ID.fullmatch(str(_part(entry, "token"))) for entry in entries]
    rendered = renderer.render_reply(reply)
    if all(named):
        ids = [int(match[1]) for match in named if match]
        return ids, logprobs, "stop" if ids[-1] == rendered[-1] else "length"
    if len(rendered) - len(logprobs) not in (0, 1):
        raise DataError(
            f"{where}: {len(logprobs)} logprobs for a text of {len(rendered) - 1} tokens and the end of the turn; it "
            "was sampled in other tokens. Give token_id:<id> entries, or use evsys_trajectory_builder"
        )
    return rendered[: len(logprobs)], logprobs, "stop" if len(rendered) == len(logprobs) else "length"


def _part(entry: Any, name: str) -> Any:
    """A field of an OpenAI entry, a dict or an object; of a bare number, the number itself."""
    if isinstance(entry, Mapping):
        return entry.get(name)
    return getattr(entry, name, entry)
