"""Rollouts that another program made: the tokens that it recorded of each call to the policy, as calls."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nat_plugin_evsys.calls import Call, StopReason
from nat_plugin_evsys.errors import DataError
from nat_plugin_evsys.rollouts.trajectories import TrajectoryGroup, checked_call


def recorded_call(
    prompt_ids: Sequence[int],
    output_ids: Sequence[int],
    logprobs: Sequence[float],
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    stop_reason: StopReason = "stop",
    sequence: int = 0,
    policy_version: int = 0,
    name: str = "call",
) -> Call:
    """The call of which another program recorded these tokens.

    Args:
        prompt_ids: what the policy read, length P.
        output_ids: what it sampled, the stop token included, length T.
        logprobs: of ``output_ids`` at ``temperature``, length T.
        sequence: the call's place among those of its rollout.
        name: what error texts call it.

    Raises:
        DataError: the ids are none, or they are not as many as the logprobs.
        ShapedDistributionError: ``top_p`` is not 1, so the tokens cannot be trained on.
    """
    call = Call(
        call_id=f"recorded-{uuid.uuid4().hex}",
        index=0,
        run_id=None,
        step_id=None,
        policy_version=policy_version,
        prompt_ids=list(prompt_ids),
        output_ids=list(output_ids),
        logprobs=list(logprobs),
        stop_reason=stop_reason,
        temperature=temperature,
        top_p=top_p,
        messages=[],
        tools=[],
        reply={"role": "assistant", "content": None},
        sequence=sequence,
    )
    return checked_call(call, name)


def gym_group(results: Sequence[Mapping[str, Any]], name: str = "group 0") -> TrajectoryGroup:
    """NeMo Gym's rollouts of one task as a group: each is what an agent's ``/run`` answers, or a line of the rollouts.

    Its model server must have ``return_token_id_information: true``, and ``responses_create_params`` the temperature.
    The reward is that of Gym's verifier.

    Args:
        name: what messages call the group.

    Raises:
        DataError: a rollout has no token ids, no temperature, or ids and logprobs that do not fit.
    """
    names = [f"rollout {position} of {name}" for position in range(len(results))]
    return TrajectoryGroup(
        name=name,
        rewards_G=[float(result["reward"]) for result in results],
        calls_G=[list(_gym_calls(result, named)) for result, named in zip(results, names, strict=True)],
    )


def _gym_calls(result: Mapping[str, Any], name: str) -> Iterator[Call]:
    """A call for each reply of a rollout. Gym gives the last item of a reply the tokens of all of it."""
    response = result["response"]
    replies = [item for item in response["output"] if item.get("generation_token_ids")]
    if not replies:
        raise DataError(f"{name}: no reply has token ids; set return_token_id_information: true of Gym's model server")
    if response.get("temperature") is None:
        raise DataError(f"{name}: at which temperature is unknown; set it in responses_create_params")
    cut = (response.get("incomplete_details") or {}).get("reason") == "max_output_tokens"
    for position, item in enumerate(replies):
        yield recorded_call(
            item["prompt_token_ids"],
            item["generation_token_ids"],
            item["generation_log_probs"],
            temperature=response["temperature"],
            top_p=1.0 if response.get("top_p") is None else response["top_p"],
            stop_reason="length" if cut and position == len(replies) - 1 else "stop",
            sequence=position,
            name=f"{name}, call {position}",
        )
