"""Trajectory groups -> the optimizer steps on them. What ``rl`` and the NAT trainer's jobs have in common.

The gradient of a step is that of the *sum* over all sampled tokens of its groups of one of the losses
importance_sampling, ppo, cispo, dro or gspo (formulas and sources in ``engine/gradient/losses.py``), with one advantage
for all tokens of a trajectory (``rollouts/advantages.py``).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tinker import Datum, types

from nat_plugin_evsys.backends.base import Backend
from nat_plugin_evsys.rollouts.advantages import AdvantageMethod
from nat_plugin_evsys.rollouts.datums import DatumSet, group_datums, with_prompt_logprobs
from nat_plugin_evsys.rollouts.trajectories import TrajectoryGroup
from nat_plugin_evsys.training.loop import NamedLoss, Step, Steps


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """How groups are trained on.

    Attributes:
        loss_fn: importance_sampling, ppo, cispo, dro or gspo.
        adam: of every optimizer step.
        loss_fn_config: the loss's settings, by Tinker's names.
        advantage: see ``group_advantages``.
        groups_per_step: groups of one optimizer step; None takes all in one.
        passes: times that the groups are trained on.
        shuffle_key: decides the order of the groups, together with the number of the pass.
        merge_calls: see ``group_datums``.
    """

    loss_fn: types.LossFnType
    adam: types.AdamParams
    loss_fn_config: dict[str, Any] | None = None
    advantage: AdvantageMethod = "group_mean"
    groups_per_step: int | None = None
    passes: int = 1
    shuffle_key: str = "0"
    merge_calls: bool = True


def build_datums(groups: Sequence[TrajectoryGroup], settings: TrainingSettings) -> list[DatumSet]:
    """The Datums of each group, in the order of the groups; see ``group_datums`` for what it leaves out."""
    s = settings
    return [
        group_datums(group, advantage=s.advantage, loss_fn=s.loss_fn, merge_calls=s.merge_calls) for group in groups
    ]


def plan_steps(sets: Sequence[DatumSet], settings: TrainingSettings) -> list[tuple[int, ...]]:
    """Positions of the groups of each optimizer step, over all passes; groups without a Datum take no part.

    Each pass has its own order, which depends on ``shuffle_key`` and the pass alone.
    """
    trainable = [index for index, datums in enumerate(sets) if datums.datums]
    size = settings.groups_per_step or max(len(trainable), 1)
    steps: list[tuple[int, ...]] = []
    for number in range(settings.passes):
        order = trainable.copy()
        random.Random(f"{settings.shuffle_key}/{number}").shuffle(order)
        steps += [tuple(order[start : start + size]) for start in range(0, len(order), size)]
    return steps


async def policy_gradient_steps(backend: Backend, sets: Sequence[DatumSet], settings: TrainingSettings) -> Steps:
    """The optimizer steps on groups, as ``plan_steps`` orders them."""
    plan = plan_steps(sets, settings)
    tokens = sum(sets[index].tokens for members in plan for index in members)
    for number, members in enumerate(plan, start=1):
        batch = [sets[index] for index in members]
        yield Step(
            data=await _step_data(backend, batch, settings),
            loss=NamedLoss(settings.loss_fn, settings.loss_fn_config),
            adam=settings.adam,
            number=number,
            total=len(plan),
            members=members,
            sampled_tokens=sum(datums.sampled_tokens for datums in batch),
            share=sum(datums.tokens for datums in batch) / tokens,
        )


async def _step_data(backend: Backend, batch: Sequence[DatumSet], settings: TrainingSettings) -> list[Datum]:
    """The Datums of one optimizer step.

    ``dro`` has no mask, so its prompt rows first get the learner's present logprobs, from one forward pass.
    """
    data = [datum for datums in batch for datum in datums.datums]
    if settings.loss_fn != "dro":
        return data
    output = await backend.forward_async(data, loss_fn=settings.loss_fn, loss_fn_config=settings.loss_fn_config)
    origins = [origin for datums in batch for origin in datums.provenance]
    return [
        with_prompt_logprobs(datum, origin, result["logprobs"])
        for datum, origin, result in zip(data, origins, output.loss_fn_outputs, strict=True)
    ]
