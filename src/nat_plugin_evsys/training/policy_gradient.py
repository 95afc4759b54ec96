"""Trajectory groups -> the optimizer steps on them. What ``rl`` and the NAT trainer's jobs have in common.

The gradient of a step is that of the *sum* over all sampled tokens of its groups of one of the losses
importance_sampling, ppo, cispo, dro, gspo or cross_entropy (formulas and sources in ``engine/gradient/losses.py``),
with the advantages of ``rollouts/advantages.py``, lowered by ``kl`` and scaled by ``normalization``. ``step_size``
bounds how far the steps on one collection of rollouts move the policy.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from nat_plugin_evsys.backends.base import Backend
from nat_plugin_evsys.rollouts.advantages import ZERO_SPREAD, has_zero_variance
from nat_plugin_evsys.rollouts.datums import DatumSet, group_datums
from nat_plugin_evsys.rollouts.trajectories import TrajectoryGroup
from nat_plugin_evsys.training.learning_rate import LearningRate
from nat_plugin_evsys.training.loop import Step, Steps, Taken
from nat_plugin_evsys.training.step_data import StepData
from nat_plugin_evsys.training.step_size import unsolved_factor
from nat_plugin_evsys.training.training_settings import TrainingSettings

__all__ = ["TrainingSettings", "build_datums", "plan_steps", "policy_gradient_steps"]


def build_datums(groups: Sequence[TrajectoryGroup], settings: TrainingSettings) -> list[DatumSet]:
    """The Datums of each group, in the order of the groups; see ``group_datums`` for what it leaves out.

    Under ``cross_entropy`` every call has the advantage 1, whatever the rewards: it is the weight of the loss.
    """
    if settings.loss_fn == "cross_entropy":
        groups = [replace(group, rewards_G=[1.0] * len(group.rewards_G), step_rewards_G=None) for group in groups]
        settings = replace(settings, loss_fn="importance_sampling", advantage="reward", discount=1.0)
    s = settings
    compared = s.failed_groups == "batch_mean"
    batch = [value for group in groups for value in group.first_returns(s.discount)] if compared else []
    sets = [
        group_datums(
            group,
            advantage=s.advantage,
            loss_fn=s.loss_fn,
            merge_calls=s.merge_calls,
            discount=s.discount,
            mask_truncated=s.mask_truncated,
            keep_silent=s.kl_beta > 0,
            batch=batch,
        )
        for group in groups
    ]
    rewards = [reward for group in groups for reward in group.rewards_G]
    if not rewards or has_zero_variance(rewards):
        return sets  # nothing tells what is solved from what fails
    best = max(rewards)
    for group, datums in zip(groups, sets, strict=True):
        datums.solved = datums.silent and min(group.rewards_G) >= best - ZERO_SPREAD
    return sets


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
    """The optimizer steps on groups, as ``plan_steps`` orders them; they end with one that ``step_size`` refuses.

    When they have ended, ``settings.step_size`` knows how far they moved the policy.
    """
    plan = plan_steps(sets, settings)
    step_data = StepData(backend, sets, settings)
    step_size = settings.step_size
    target = None if settings.loss_fn == "cross_entropy" else step_size.target
    if settings.recompute_logprobs:
        sets = await step_data.recomputed(sets)
    elif settings.loss_fn != "cross_entropy":
        sets = await step_data.completed(sets)
    before = sets if target is None or not settings.sampled_elsewhere else await step_data.at_start(sets)
    rate = settings.rate or LearningRate(settings.adam.learning_rate)
    tokens = sum(sets[index].tokens for members in plan for index in members)
    silent = sum(datums.silent for datums in sets)
    solved = sum(datums.solved for datums in sets) if settings.lr_scaling == "unsolved" else 0
    places = min(step_data.places, len(sets))
    last: Taken | None = None
    moved: float | None = None
    for number, members in enumerate(plan, start=1):
        batch = [sets[index] for index in members]
        data, loss, measured = await step_data.of(batch)
        with_signal = sum(not datums.silent for datums in batch)
        factor = step_size.next * unsolved_factor(places, with_signal, silent, solved)
        taken = yield Step(
            data=data,
            loss=loss,
            adam=settings.adam.model_copy(update={"learning_rate": factor * rate.at_step(number, len(plan))}),
            number=number,
            total=len(plan),
            epoch=1 + (number - 1) * settings.passes // len(plan),
            members=members,
            sampled_tokens=sum(datums.sampled_tokens for datums in batch),
            share=sum(datums.tokens for datums in batch) / tokens,
            normalized=settings.normalization != "sum",
            moved=None if target is None else partial(step_data.moved, [before[index] for index in members], data),
            most_kl=target if number > 1 else None,
            measured=measured,
        )
        if taken is not None:  # else nobody says what came of the steps
            if number > 1 and taken.moved is not None:
                moved = max(moved or 0.0, taken.moved)
            elif number > 1 and target is not None:
                step_size.warn_unseen()
            if taken.refused:
                break
        step_size.taken += 1
        last = taken
    if last is not None and target is not None:
        if moved is None:  # no later step has seen what the steps did
            moved = await step_data.kl_from([before[index] for index in last.step.members])
        step_size.observe(moved)
        last.metrics.values.update({"kl_moved": moved, "lr_factor": step_size.factor})
