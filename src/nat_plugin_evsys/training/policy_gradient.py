"""Trajectory groups -> the optimizer steps on them. What ``rl`` and the NAT trainer's jobs have in common.

The gradient of a step is that of the *sum* over all sampled tokens of its groups of one of the losses
importance_sampling, ppo, cispo, dro or gspo (formulas and sources in ``engine/gradient/losses.py``), with the
advantages of ``rollouts/advantages.py``, lowered by ``kl`` and scaled by ``normalization``. The steps end early where
the policy has moved further from the sampler than ``target_kl``.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from nat_plugin_evsys.backends.base import Backend
from nat_plugin_evsys.rollouts.datums import DatumSet, group_datums
from nat_plugin_evsys.rollouts.trajectories import TrajectoryGroup
from nat_plugin_evsys.training.learning_rate import LearningRate
from nat_plugin_evsys.training.loop import Step, Steps
from nat_plugin_evsys.training.step_data import StepData
from nat_plugin_evsys.training.training_settings import TrainingSettings

__all__ = ["TrainingSettings", "build_datums", "plan_steps", "policy_gradient_steps"]


def build_datums(groups: Sequence[TrajectoryGroup], settings: TrainingSettings) -> list[DatumSet]:
    """The Datums of each group, in the order of the groups; see ``group_datums`` for what it leaves out."""
    s = settings
    return [
        group_datums(
            group,
            advantage=s.advantage,
            loss_fn=s.loss_fn,
            merge_calls=s.merge_calls,
            mask_truncated=s.mask_truncated,
        )
        for group in groups
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
    """The optimizer steps on groups, as ``plan_steps`` orders them; they end with one that ``target_kl`` refuses."""
    plan = plan_steps(sets, settings)
    step_data = StepData(backend, sets, settings)
    rate = settings.rate or LearningRate(settings.adam.learning_rate)
    tokens = sum(sets[index].tokens for members in plan for index in members)
    for number, members in enumerate(plan, start=1):
        batch = [sets[index] for index in members]
        data, loss, measured = await step_data.of(batch)
        taken = yield Step(
            data=data,
            loss=loss,
            adam=settings.adam.model_copy(update={"learning_rate": rate.at_step(number, len(plan))}),
            number=number,
            total=len(plan),
            epoch=1 + (number - 1) * settings.passes // len(plan),
            members=members,
            sampled_tokens=sum(datums.sampled_tokens for datums in batch),
            share=sum(datums.tokens for datums in batch) / tokens,
            normalized=settings.normalization != "sum",
            most_kl=settings.target_kl if number > 1 else None,
            measured=measured,
        )
        if taken is not None and taken.refused:
            return
