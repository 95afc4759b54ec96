"""This package's trajectory groups as ``art.TrajectoryGroup`` (OpenPipe ART), with the exact sampled tokens."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any

from nat_plugin_evsys.calls import Call
from nat_plugin_evsys.errors import ConfigError
from nat_plugin_evsys.rollouts.episodes import message_chains, new_messages
from nat_plugin_evsys.rollouts.trajectories import TrajectoryGroup

if TYPE_CHECKING:
    import art


def to_art_groups(groups: list[TrajectoryGroup]) -> list[art.TrajectoryGroup]:
    """Convert trajectory groups to ART's.

    Each conversation of a trajectory becomes a history: the first one its ``messages_and_choices``, the others its
    ``additional_histories``. Replies are ``Choice`` objects whose logprobs carry the token ids in the ``token_id:<id>``
    form that ART reads; sampled tokens are never re-tokenised by it.

    The first call imports art, which takes seconds. Its patch of transformers is kept out, because the engine runs on
    transformers in the same process; a program that trains with ART itself imports art before.

    Raises:
        ConfigError: openpipe-art is not installed.
    """
    try:
        with _transformers_left_alone():
            import art
    except ImportError as error:
        raise ConfigError(
            f"ART trajectory groups were asked for, but `import art` failed ({error}); "
            "type: pip install 'nat_plugin_evsys[art]'"
        ) from error
    return [
        art.TrajectoryGroup(
            [_trajectory(art, reward, calls) for reward, calls in zip(group.rewards_G, group.calls_G, strict=True)],
            metadata={"name": group.name},
        )
        for group in groups
    ]


@contextmanager
def _transformers_left_alone() -> Iterator[None]:
    """Import art without its patch of ``masking_utils._preprocess_mask_arguments``.

    The patch has the signature of an older transformers, so that every later forward pass would raise TypeError. A
    stand-in keeps it from being applied even for the seconds of the import, in which a training step may be running.
    """
    from transformers import masking_utils

    name = "art.transformers.patches"
    stand_in: Any = ModuleType(name)
    stand_in.patch_preprocess_mask_arguments = lambda: None
    before = getattr(masking_utils, "_preprocess_mask_arguments", None)
    sys.modules.setdefault(name, stand_in)
    try:
        yield
    finally:
        if sys.modules.get(name) is stand_in:
            del sys.modules[name]
        if before is not None:
            masking_utils._preprocess_mask_arguments = before


def _trajectory(art: Any, reward: float, calls: list[Call]) -> art.Trajectory:
    from art.trajectories import History

    histories = [(_messages_and_choices(chain), chain[0].tools or None) for chain in message_chains(calls)]
    messages, tools = histories[0] if histories else ([], None)
    versions = [call.policy_version for call in calls]
    return art.Trajectory(
        messages_and_choices=messages,
        tools=tools,
        additional_histories=[History(messages_and_choices=m, tools=t) for m, t in histories[1:]],
        reward=reward,
        initial_policy_version=min(versions, default=None),
        final_policy_version=max(versions, default=None),
        metrics={"calls": len(calls), "sampled_tokens": sum(len(call.output_ids) for call in calls)},
        metadata={"call_ids": ",".join(call.call_id for call in calls)},
    )


def _messages_and_choices(chain: list[Call]) -> list[Any]:
    parents = [None, *chain[:-1]]
    return [
        entry
        for call, parent in zip(chain, parents, strict=True)
        for entry in (*new_messages(call, parent), _choice(call))
    ]


def _choice(call: Call) -> Any:
    from openai.types.chat.chat_completion import Choice

    reply = {"role": "assistant", "content": None, **call.reply}
    tokens = [
        {"token": f"token_id:{token}", "logprob": logprob, "bytes": [], "top_logprobs": []}
        for token, logprob in zip(call.output_ids, call.logprobs, strict=True)
    ]
    stopped = "tool_calls" if reply.get("tool_calls") else call.stop_reason
    return Choice.model_validate(
        {
            "index": call.index,
            "finish_reason": "length" if call.stop_reason == "length" else stopped,
            "message": reply,
            "logprobs": {"content": tokens, "refusal": None},
        }
    )
