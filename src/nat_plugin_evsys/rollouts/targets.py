"""NAT's ``finetuning.target_functions``: the functions whose calls are trained on."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from nat_plugin_evsys.calls import Call
from nat_plugin_evsys.rollouts.attempts import Attempt

WORKFLOW = "<workflow>"
"""NAT's name of the workflow itself, in which all calls are made."""

GROUP_SEPARATOR = "__"
"""NAT calls a function ``GROUP__FUNCTION`` that belongs to a group."""


def targeted(attempt: Attempt, functions: Collection[str]) -> tuple[list[Call], list[float] | None, list[Call]]:
    """The calls to train on, their step rewards where the attempt has any, and the other calls.

    A call belongs to each function that it was made in: that of an agent's tool belongs to the tool and to the agent.

    Args:
        functions: names of functions, or of groups of functions.
    """
    if WORKFLOW in functions:
        return attempt.calls, attempt.step_rewards, []
    chosen = [any(_names(name, functions) for name in call.functions) for call in attempt.calls]
    steps = attempt.step_rewards
    return (
        [call for call, yes in zip(attempt.calls, chosen, strict=True) if yes],
        None if steps is None else [step for step, yes in zip(steps, chosen, strict=True) if yes],
        [call for call, yes in zip(attempt.calls, chosen, strict=True) if not yes],
    )


def only_targeted(attempt: Attempt, functions: Collection[str]) -> Attempt:
    """The attempt with the calls to train on alone; see ``targeted``."""
    calls, step_rewards, _ = targeted(attempt, functions)
    return replace(attempt, calls=calls, step_rewards=step_rewards)


def _names(function: str, functions: Collection[str]) -> bool:
    return function in functions or function.split(GROUP_SEPARATOR)[0] in functions
