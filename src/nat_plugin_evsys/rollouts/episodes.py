"""The episode view of recorded calls: messages with roles, for reading and for the role rules.

Training never reads it (it reads the calls' token ids); it is what NAT, ART and a human see of an attempt.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from nat.data_models.finetuning import EpisodeItem, EpisodeItemRole

from nat_plugin_evsys.call_images import referred
from nat_plugin_evsys.calls import Call
from nat_plugin_evsys.rollouts.roles import FIRST, OBSERVATIONS

Message = dict[str, Any]

_ROLES = {role.value: role for role in EpisodeItemRole if role is not EpisodeItemRole.OTHER}
_ROLES["developer"] = EpisodeItemRole.SYSTEM
MESSAGE_FIELDS = ("tool_calls", "tool_call_id", "name")
"""What an item's metadata keeps of its message, beside role and content."""


def message_chains(calls: list[Call]) -> list[list[Call]]:
    """Group calls into conversations: a call joins the chain whose messages and last reply its own messages extend.

    Chains keep the order of their first calls. A chain grows only at its end, so a retry or a parallel call starts a
    new chain.
    """
    chains: list[list[Call]] = []
    for call in calls:
        parents = [chain for chain in chains if _extends(call, chain[-1])]
        if parents:
            max(parents, key=lambda chain: len(chain[-1].messages)).append(call)
        else:
            chains.append([call])
    return chains


def new_messages(call: Call, parent: Call | None) -> list[Message]:
    """The messages of ``call`` that come after its parent's messages and reply (all of them without a parent)."""
    return call.messages if parent is None else call.messages[len(parent.messages) + 1 :]


def episode_of(calls: list[Call]) -> list[EpisodeItem]:
    """The messages of one attempt as episode items that satisfy ``validate_episode_order``.

    Chains follow one another. Replies carry their token logprobs; assistant messages that were not sampled here
    (few-shot examples, history) carry an empty list. If the messages themselves break the role order, the view is
    repaired: neighbours of the same role are joined, an unknown role or an observation without an assistant turn is
    shown as user (its own role in the item's metadata), and an empty system item is put before an episode that opens
    differently.
    """
    items: list[EpisodeItem] = []
    for chain in message_chains(calls):
        parent: Call | None = None
        for call in chain:
            items += [_message_item(message) for message in new_messages(call, parent)]
            items.append(_reply_item(call))
            parent = call
    return _in_order(items)


def text_of(content: Any) -> str:
    """The text of an OpenAI message content: a string, None, or a list of parts. Parts without text are named, images
    by their hash."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    return "".join(_part_text(part) for part in content)


def _part_text(part: dict[str, Any]) -> str:
    if "text" in part:
        return str(part["text"])
    image = referred(part)
    return f"<{part.get('type', 'part')}>" if image is None else f"<image {image}>"


def _extends(call: Call, parent: Call) -> bool:
    length = len(parent.messages)
    if len(call.messages) <= length or _key(call.messages[length]) != _key(parent.reply):
        return False
    return all(_key(a) == _key(b) for a, b in zip(call.messages, parent.messages, strict=False))


def _key(message: Message) -> str:
    """A key by which equal messages compare equal: clients rewrite None contents, argument spacing and extra fields."""
    calls = [
        (tool_call.get("id"), (function := tool_call.get("function") or {}).get("name"), _json(function))
        for tool_call in message.get("tool_calls") or []
    ]
    key = (message.get("role"), text_of(message.get("content")), calls, message.get("tool_call_id"))
    return json.dumps(key, sort_keys=True, default=str)


def _json(function: Message) -> Any:
    arguments = function.get("arguments")
    try:
        return json.loads(arguments) if isinstance(arguments, str) else arguments
    except json.JSONDecodeError:
        return arguments


def _message_item(message: Message) -> EpisodeItem:
    role = _ROLES.get(str(message.get("role")))
    metadata = {name: message[name] for name in MESSAGE_FIELDS if message.get(name)}
    if role is None:
        role, metadata["role"] = EpisodeItemRole.USER, message.get("role")
    logprobs: list[float] | None = [] if role is EpisodeItemRole.ASSISTANT else None
    return EpisodeItem(role=role, content=text_of(message.get("content")), logprobs=logprobs, metadata=metadata or None)


def _reply_item(call: Call) -> EpisodeItem:
    metadata: dict[str, Any] = {"call_ids": [call.call_id], "policy_version": call.policy_version}
    metadata |= {name: call.reply[name] for name in MESSAGE_FIELDS if call.reply.get(name)}
    return EpisodeItem(
        role=EpisodeItemRole.ASSISTANT,
        content=text_of(call.reply.get("content")),
        logprobs=list(call.logprobs),
        metadata=metadata,
    )


def _in_order(items: Iterable[EpisodeItem]) -> list[EpisodeItem]:
    mended: list[EpisodeItem] = []
    for item in items:
        last = mended[-1].role if mended else None
        answers = last is EpisodeItemRole.ASSISTANT or last in OBSERVATIONS
        if item.role in OBSERVATIONS and not answers:
            metadata = {**(item.metadata or {}), "role": item.role.value}
            item = EpisodeItem(role=EpisodeItemRole.USER, content=item.content, metadata=metadata)
        if last is None and item.role not in FIRST:
            mended.append(EpisodeItem(role=EpisodeItemRole.SYSTEM, content=""))
        joinable = item.role not in OBSERVATIONS and item.role is not EpisodeItemRole.SYSTEM
        if mended and joinable and mended[-1].role is item.role:
            mended[-1] = _joined(mended[-1], item)
        else:
            mended.append(item)
    return mended


def _joined(first: EpisodeItem, second: EpisodeItem) -> EpisodeItem:
    metadata = dict(first.metadata or {})
    for name, value in (second.metadata or {}).items():
        lists = isinstance(value, list) and isinstance(metadata.get(name), list)
        metadata[name] = metadata[name] + value if lists else value
    logprobs = None if first.logprobs is None else first.logprobs + second.logprobs
    content = "\n".join(text for text in (first.content, second.content) if text)
    return EpisodeItem(role=first.role, content=content, logprobs=logprobs, metadata=metadata or None)
