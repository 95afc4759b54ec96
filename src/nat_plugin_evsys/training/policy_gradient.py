"""Trajectory groups -> the optimizer steps on them. What ``rl`` and the NAT trainer's jobs have in common.

The gradient of a step is that of the *sum* over all sampled tokens of its groups of one of the losses
importance_sampling, ppo, cispo, dro or gspo (formulas and sources in ``engine/gradient/losses.py``), with the
advantages of ``rollouts/advantages.py`` scaled as ``normalization`` says.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tinker import Datum, types

from nat_plugin_evsys.backends.base import Backend
from nat_plugin_evsys.errors import ConfigError
from nat_plugin_evsys.rollouts.advantages import AdvantageMethod
from nat_plugin_evsys.rollouts.datums import DatumSet, group_datums, with_prompt_logprobs
from nat_plugin_evsys.rollouts.trajectories import TrajectoryGroup
from nat_plugin_evsys.training.learning_rate import LearningRate
from nat_plugin_evsys.training.loop import NamedLoss, Step, Steps
from nat_plugin_evsys.training.normalization import Normalization, datum_scales, scaled

DRO_BETA = 0.05
"""Tinker's default."""


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """How groups are trained on.

    Attributes:
        loss_fn: importance_sampling, ppo, cispo, dro or gspo.
        adam: of every optimizer step, except for the learning rate.
        rate: the learning rate over the steps, default that of ``adam``.
        normalization: how much a token weighs; see ``normalization``.
        loss_fn_config: the loss's settings, by Tinker's names.
        advantage: see ``group_advantages``.
        groups_per_step: groups of one optimizer step; None takes all in one.
        passes: times that the groups are trained on.
        shuffle_key: decides the order of the groups, together with the number of the pass.
        merge_calls: see ``group_datums``.

    Raises:
        ConfigError: ``dro`` with ``sequences``, whose scales differ between Datums.
    """

    loss_fn: types.LossFnType
    adam: types.AdamParams
    rate: LearningRate | None = None
    normalization: Normalization = "full_step"
    loss_fn_config: dict[str, Any] | None = None
    advantage: AdvantageMethod = "group_mean"
    groups_per_step: int | None = None
    passes: int = 1
    shuffle_key: str = "0"
    merge_calls: bool = True

    def __post_init__(self) -> None:
        if self.loss_fn == "dro" and self.normalization == "sequences":
            raise ConfigError(
                "loss_fn dro takes no normalization `sequences`: its quadratic term has one weight for all tokens; "
                "choose full_step, tokens or sum"
            )


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
    full_step_tokens = _full_step_tokens(sets, settings)
    rate = settings.rate or LearningRate(settings.adam.learning_rate)
    tokens = sum(sets[index].tokens for members in plan for index in members)
    for number, members in enumerate(plan, start=1):
        batch = [sets[index] for index in members]
        data, loss = await _step_data(backend, batch, settings, full_step_tokens)
        yield Step(
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
        )


def _full_step_tokens(sets: Sequence[DatumSet], settings: TrainingSettings) -> float:
    """Sampled tokens of a step that has all its groups, at the job's mean length of a group."""
    lengths = [datums.sampled_tokens for datums in sets if datums.datums]
    return (settings.groups_per_step or len(sets)) * sum(lengths) / max(len(lengths), 1)


async def _step_data(
    backend: Backend, batch: Sequence[DatumSet], settings: TrainingSettings, full_step_tokens: float
) -> tuple[list[Datum], NamedLoss]:
    """The Datums of one optimizer step with their advantages scaled, and the loss.

    ``dro`` has no mask, so its prompt rows first get the learner's present logprobs, from one forward pass.
    """
    data = [datum for datums in batch for datum in datums.datums]
    scales = _scales(batch, settings, full_step_tokens)
    scaled_data = [scaled(datum, scale) for datum, scale in zip(data, scales, strict=True)]
    if settings.loss_fn != "dro":
        return scaled_data, NamedLoss(settings.loss_fn, settings.loss_fn_config)
    output = await backend.forward_async(data, loss_fn=settings.loss_fn, loss_fn_config=settings.loss_fn_config)
    origins = [origin for datums in batch for origin in datums.provenance]
    read = [
        with_prompt_logprobs(datum, origin, result["logprobs"])
        for datum, origin, result in zip(scaled_data, origins, output.loss_fn_outputs, strict=True)
    ]
    beta = (settings.loss_fn_config or {}).get("beta", DRO_BETA)
    return read, NamedLoss(settings.loss_fn, {"beta": beta * scales[0]})


def _scales(batch: Sequence[DatumSet], settings: TrainingSettings, full_step_tokens: float) -> list[float]:
    origins = [(group, origin) for group, datums in enumerate(batch) for origin in datums.provenance]
    lengths = [origin.sampled_tokens for _, origin in origins]
    places = {key: number for number, key in enumerate(dict.fromkeys((group, o.trajectory) for group, o in origins))}
    trajectories = [places[group, origin.trajectory] for group, origin in origins]
    return datum_scales(lengths, trajectories, settings.normalization, full_step_tokens=full_step_tokens)
