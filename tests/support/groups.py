"""Groups of random tokens, and the steps on them."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

from tinker import types

from nat_plugin_evsys.calls import Call
from nat_plugin_evsys.rollouts.trajectories import TrajectoryGroup
from nat_plugin_evsys.training.loop import Step
from nat_plugin_evsys.training.policy_gradient import TrainingSettings, build_datums, policy_gradient_steps

ADAM = types.AdamParams(learning_rate=1e-2)


def make_group(name: str, rewards: list[float], seed: int, turns: int = 1) -> TrajectoryGroup:
    """Trajectories of random tokens; the calls of one do not extend one another."""
    source = random.Random(seed)
    calls_G = []
    for trajectory in range(len(rewards)):
        calls = []
        for turn in range(turns):
            output = [source.randrange(256) for _ in range(source.randrange(1, 9))]
            calls.append(
                Call(
                    call_id=f"{name}-{trajectory}-{turn}",
                    index=0,
                    run_id=None,
                    step_id=None,
                    policy_version=0,
                    prompt_ids=[turn, *(source.randrange(256) for _ in range(3))],
                    output_ids=output,
                    logprobs=[-source.uniform(4, 7) for _ in output],
                    stop_reason="stop",
                    temperature=1.0,
                    top_p=1.0,
                    messages=[],
                    tools=[],
                    reply={},
                    sequence=turn,
                )
            )
        calls_G.append(calls)
    return TrajectoryGroup(name, rewards, calls_G)


GROUPS = [
    make_group("one", [1.0, 0.0, 0.25], 1, turns=2),
    make_group("none", [1.0, 1.0], 2),
    make_group("two", [0.0, 2.0], 3),
]
"""The second has no signal."""


async def steps_of(backend: Any, groups: list[TrajectoryGroup], **settings: Any) -> list[Step]:
    chosen = TrainingSettings(**{"loss_fn": "importance_sampling", "adam": ADAM, **settings})
    return [step async for step in policy_gradient_steps(backend, build_datums(groups, chosen), chosen)]


def at_temperatures(group: TrajectoryGroup, temperatures: list[float]) -> TrajectoryGroup:
    """The group with its calls at these temperatures in turn."""
    source = iter(temperatures * 10)
    calls_G = [[dataclasses.replace(call, temperature=next(source)) for call in calls] for calls in group.calls_G]
    return TrajectoryGroup(group.name, group.rewards_G, calls_G)
