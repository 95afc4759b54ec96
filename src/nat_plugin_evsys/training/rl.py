"""Reinforcement learning on prompts and a reward function: group-relative policy gradient.

An iteration freezes the policy, samples ``group_size`` replies to each prompt of a batch, gives each reply the
advantage ``A = r - mean(r of its group)`` (or another of ``rollouts/advantages.py``) and takes one or more AdamW steps
on the sum over tokens of a policy-gradient loss, for importance_sampling

    L = -sum_t exp(lp_t - q_t) A,

with ``lp`` the learner's and ``q`` the sampler's logprobs of the sampled tokens.

Source: GRPO, arXiv 2402.03300, in the form of Tinker's rl_loop. Simplified against GRPO: no division by the group's
standard deviation unless asked for (``advantage="group_mean_std"``), sums over tokens in place of means over each
reply, and no KL penalty to a reference policy. One reply is one trajectory; agents of several calls are trained through
NAT's trainer, whose jobs take the same steps (``policy_gradient``).
"""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import math
import statistics
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, SupportsFloat, TypeVar

from tinker import types

from nat_plugin_evsys.backends.base import Backend, SamplingClient, shaped_by
from nat_plugin_evsys.calls import Call, DropReason
from nat_plugin_evsys.errors import ConfigError, DataError
from nat_plugin_evsys.rollouts.seeds import rollout_seed
from nat_plugin_evsys.rollouts.trajectories import TrajectoryGroup
from nat_plugin_evsys.training.loop import run_steps
from nat_plugin_evsys.training.policy_gradient import TrainingSettings, build_datums, policy_gradient_steps
from nat_plugin_evsys.training.schedule import check_schedule, count_steps, epoch_batches

Row = TypeVar("Row")


@dataclass(frozen=True, slots=True)
class RlIteration:
    """Sampling and training of one batch of rows.

    Attributes:
        iteration: from 1 to ``total_iterations``.
        total_iterations: of the whole training.
        epoch: from 1.
        policy_version: the version that sampled.
        reward_mean: over all replies of the batch.
        trajectories: replies sampled.
        dropped: replies not trained on, by reason (``zero_variance_group``: all rewards of a group are equal).
        steps: metrics of each optimizer step (``loss:sum``, ``ratio:mean``, ``grad_norm``, …); empty if all replies
            were dropped.
    """

    iteration: int
    total_iterations: int
    epoch: int
    policy_version: int
    reward_mean: float
    trajectories: int
    dropped: Counter[DropReason]
    steps: list[dict[str, float]]


async def sample_group(
    client: SamplingClient,
    prompt_ids: Sequence[int],
    reward: Callable[[str], float | Awaitable[float]],
    *,
    group_size: int,
    sampling: types.SamplingParams,
    tokenizer: Any,
    name: str = "group 0",
) -> TrajectoryGroup:
    """``group_size`` replies to one prompt, with their rewards.

    Args:
        prompt_ids: length P.
        reward: of a reply's text (special tokens left out); may be a coroutine function.
        tokenizer: decodes the replies.
        name: what messages call the group.

    Raises:
        DataError: a reward is not a finite number, or the sampler gives no logprobs.
        PromptTooLongError: the prompt leaves no room in the context window.
    """
    response = await client.sample_async(types.ModelInput.from_ints(list(prompt_ids)), group_size, sampling)
    group = TrajectoryGroup(name=name, rewards_G=[], calls_G=[])
    for index, sequence in enumerate(response.sequences):
        if sequence.logprobs is None:
            raise DataError(f"{name}: the backend's sampler gave no logprobs, which rl needs")
        text = tokenizer.decode(sequence.tokens, skip_special_tokens=True)
        value = reward(text)
        value = await value if inspect.isawaitable(value) else value
        if not isinstance(value, SupportsFloat) or not math.isfinite(value):
            raise DataError(f"{name}: the reward of reply {index} is {value}; return a finite number ({text[:80]!r})")
        call = Call(
            call_id=sequence.sequence_id,
            index=index,
            run_id=None,
            step_id=None,
            policy_version=client.policy_version,
            prompt_ids=list(prompt_ids),
            output_ids=list(sequence.tokens),
            logprobs=list(sequence.logprobs),
            stop_reason=sequence.stop_reason,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            messages=[],
            tools=[],
            reply={"role": "assistant", "content": text},
            sequence=index,
        )
        group.rewards_G.append(float(value))
        group.calls_G.append([call])
    return group


async def train_rl(
    backend: Backend,
    rows: Sequence[Row],
    *,
    render: Callable[[Row], Sequence[int]],
    reward: Callable[[Row, str], float | Awaitable[float]],
    settings: TrainingSettings,
    epochs: int,
    batch_size: int,
    group_size: int,
    sampling: types.SamplingParams,
    seed: int = 0,
    on_iteration: Callable[[RlIteration, list[TrajectoryGroup]], None] | None = None,
) -> list[RlIteration]:
    """Sample, reward and train, ``batch_size`` rows an iteration, all rows once an epoch in an order set by ``seed``.

    Args:
        rows: anything; ``render`` and ``reward`` know what it is.
        render: a row's prompt ids, ending where the reply begins.
        reward: ``(row, reply text) -> number``, or a coroutine of it.
        settings: the loss and its optimizer steps; a schedule of the learning rate is over all iterations.
        group_size: replies to each row.
        sampling: for every reply. The learner has its temperature; what cuts or shapes the distribution besides
            (``top_p``, penalties, …) must be left alone, since the learner's is not. Its ``seed`` must be None: seeds
            derive from ``seed``.
        on_iteration: called after each iteration with its record and the groups that it trained on.

    Raises:
        ConfigError: a setting is out of range.
        DataError: ``rows`` is empty, or a reward is not finite.
        NonFiniteGradientError: a step was refused; the weights are those of the step before.
    """
    check_schedule("rl", epochs, batch_size, settings.adam.learning_rate)
    if group_size < 1 or sampling.seed is not None:
        raise ConfigError(
            f"rl needs group_size >= 1 and sampling.seed None (seeds derive from `seed`), got group_size={group_size}, "
            f"sampling.seed={sampling.seed}"
        )
    if sampling.top_p < 1 or sampling.top_k > 0 or shaped_by(sampling):
        raise ConfigError(
            "rl cannot train on replies sampled with top_p, top_k or repetition_penalty, nor with min_p, another "
            "penalty or a logit_bias that is no ban; leave them at their defaults (any temperature is fine)"
        )
    if not rows:
        raise DataError("rl has no rows to sample from; give at least one")
    tokenizer = backend.get_tokenizer()

    async def roll_out(client: SamplingClient, iteration: int, batch: list[Row]) -> list[TrajectoryGroup]:
        async def group(index: int, row: Row) -> TrajectoryGroup:
            ids = list(render(row))
            seeded = sampling.model_copy(update={"seed": rollout_seed(seed, f"rl/{iteration}", str(ids), index)})
            name = f"group {index} of iteration {iteration}"
            return await sample_group(
                client,
                ids,
                partial(reward, row),
                group_size=group_size,
                sampling=seeded,
                tokenizer=tokenizer,
                name=name,
            )

        return await asyncio.gather(*(group(index, row) for index, row in enumerate(batch)))

    total = count_steps(len(rows), epochs, batch_size)
    history: list[RlIteration] = []
    for epoch, positions in epoch_batches(len(rows), epochs, batch_size, seed):
        iteration = len(history) + 1
        client = await backend.snapshot_sampling_client()
        groups = await roll_out(client, iteration, [rows[index] for index in positions])
        steps, dropped = await train_groups(backend, groups, _of_iteration(settings, iteration, total))
        rewards = [value for group in groups for value in group.rewards_G]
        mean = statistics.fmean(rewards)
        history.append(RlIteration(iteration, total, epoch, client.policy_version, mean, len(rewards), dropped, steps))
        if on_iteration is not None:
            on_iteration(history[-1], groups)
    return history


def _of_iteration(settings: TrainingSettings, iteration: int, total: int) -> TrainingSettings:
    """The settings with the iteration's own order of groups and its part of the learning rate's schedule."""
    rate = settings.rate and dataclasses.replace(settings.rate, start=(iteration - 1) / total, end=iteration / total)
    return dataclasses.replace(settings, rate=rate, shuffle_key=f"{settings.shuffle_key}/{iteration}")


async def train_groups(
    backend: Backend, groups: Sequence[TrajectoryGroup], settings: TrainingSettings
) -> tuple[list[dict[str, float]], Counter[DropReason]]:
    """Every optimizer step on some groups; returns each step's metrics, and the dropped trajectories by reason."""
    sets = build_datums(groups, settings)
    steps = await run_steps(backend, policy_gradient_steps(backend, sets, settings))
    dropped = sum((datums.dropped_trajectories for datums in sets), start=Counter[DropReason]())
    return [metrics.values for metrics in steps], dropped
