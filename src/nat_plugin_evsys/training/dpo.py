"""Direct preference optimisation on pairs of replies to one prompt.

For a chosen reply c and a rejected reply r, with ``lp`` the learner's and ``ref`` the reference policy's
log-probability of a whole reply (the sum over its tokens):

    m = beta * ((lp_c - ref_c) - (lp_r - ref_r))
    L = sum over pairs of -log sigmoid(m)

``beta * (lp - ref)`` is the implicit reward of a reply and ``m`` the margin. Source: DPO, arXiv 2305.18290 eq. 7.
Simplified: the reference is the policy as it is when training starts (with a fresh adapter, the base model), and its
logprobs are computed once; there is no label smoothing; replies are not normalised by their length.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from nat.data_models.finetuning import DPOItem
from tinker import Datum, TensorData, types

from nat_plugin_evsys.backends.base import Backend, LossCallable
from nat_plugin_evsys.errors import ConfigError, DataError
from nat_plugin_evsys.runtime import defaults
from nat_plugin_evsys.training.learning_rate import LearningRate
from nat_plugin_evsys.training.loop import Step, Steps, Taken, run_steps
from nat_plugin_evsys.training.schedule import check_schedule, count_steps, epoch_batches
from nat_plugin_evsys.training.sft import Render, RenderReply, reply_datum, reply_tokens
from nat_plugin_evsys.training.step_size import StepSize

if TYPE_CHECKING:
    import torch

Pair = tuple[Datum, Datum]
"""``(chosen, rejected)``."""

REFERENCE = "reference_logprobs"
"""Name of the reference policy's logprobs in ``loss_fn_inputs``, shape (N,) as the target_tokens."""


@dataclass(frozen=True, slots=True)
class DpoStep:
    """One optimizer step.

    Attributes:
        step: from 1 to ``total_steps``.
        total_steps: steps of the whole training.
        epoch: from 1.
        pairs: of the batch.
        loss: mean over the pairs, before the step; log 2 before anything is learnt.
        accuracy: share of pairs with a positive margin (half a share for a margin of 0).
        margin: mean margin.
        chosen_reward, rejected_reward: mean implicit rewards.
        learning_rate: of this step.
        grad_norm: norm of the summed gradient, before any clipping.
    """

    step: int
    total_steps: int
    epoch: int
    pairs: int
    loss: float
    accuracy: float
    margin: float
    chosen_reward: float
    rejected_reward: float
    learning_rate: float
    grad_norm: float


def build_dpo_pairs(items: Sequence[DPOItem], render: Render, render_reply: RenderReply) -> list[Pair]:
    """A Datum of each pair's chosen and rejected reply, with weight 1 on reply tokens and 0 on the prompt's.

    Args:
        items: a prompt that is a string becomes one user message.
        render, render_reply: as in ``sft``.

    Raises:
        DataError: both replies are the same, or something renders to no tokens; names the item.
    """
    pairs = []
    for index, item in enumerate(items):
        prompt = [{"role": "user", "content": item.prompt}] if isinstance(item.prompt, str) else item.prompt
        messages: list[Mapping[str, Any]] = [m if isinstance(m, dict) else m.model_dump() for m in prompt]
        prompt_ids = list(render(messages, []))
        replies = [
            list(render_reply({"role": "assistant", "content": text}))
            for text in (item.chosen_response, item.rejected_response)
        ]
        if not prompt_ids or not all(replies):
            sizes = ", ".join(str(len(reply)) for reply in replies)
            raise DataError(f"items[{index}] renders to {len(prompt_ids)} prompt and {sizes} reply tokens")
        if replies[0] == replies[1]:
            raise DataError(f"items[{index}]: the chosen and the rejected response have the same tokens; leave it out")
        pairs.append((reply_datum(prompt_ids, replies[0]), reply_datum(prompt_ids, replies[1])))
    return pairs


async def with_reference(backend: Backend, pairs: Sequence[Pair]) -> list[Pair]:
    """Copies of the pairs whose Datums carry the logprobs of the backend's current policy as ``REFERENCE``."""
    data = [datum for pair in pairs for datum in pair]
    outputs = (await backend.forward_async(data, loss_fn="cross_entropy")).loss_fn_outputs
    done = [
        dataclasses.replace(datum, loss_fn_inputs={**datum.loss_fn_inputs, REFERENCE: _float32(output["logprobs"])})
        for datum, output in zip(data, outputs, strict=True)
    ]
    return list(zip(done[::2], done[1::2], strict=True))


def dpo_loss(beta: float) -> LossCallable:
    """The loss of the module's docstring, for ``forward_backward_custom_async``.

    The data alternates chosen and rejected Datums: chosen 0, rejected 0, chosen 1, … Each has ``target_tokens`` (N,),
    ``weights`` (N,) (1 on reply tokens, 0 elsewhere) and ``REFERENCE`` (N,). Metrics: ``loss:mean``, ``accuracy:mean``,
    ``margin:mean``, ``chosen_reward:mean``, ``rejected_reward:mean``, all over pairs.
    """

    def loss_fn(data: list[Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        import torch

        rewards = torch.stack([beta * _log_ratio(datum, lp) for datum, lp in zip(data, logprobs, strict=True)])
        chosen, rejected = rewards[::2], rewards[1::2]
        margin = chosen - rejected
        loss = -torch.nn.functional.logsigmoid(margin)
        wins = (margin > 0).double() + 0.5 * (margin == 0).double()
        means = {
            "loss:mean": loss,
            "accuracy:mean": wins,
            "margin:mean": margin,
            "chosen_reward:mean": chosen,
            "rejected_reward:mean": rejected,
        }
        return loss.sum(), {name: float(value.detach().mean()) for name, value in means.items()}

    return loss_fn


async def train_dpo(
    backend: Backend,
    pairs: Sequence[Pair],
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    beta: float = 0.1,
    seed: int = 0,
    on_step: Callable[[DpoStep], None] | None = None,
) -> list[DpoStep]:
    """Train on ``pairs`` against the current policy, reshuffled each epoch by ``seed``.

    The learning rate falls linearly, as in ``train_sft``. The gradient is that of the *sum* over the batch's pairs.

    Args:
        batch_size: pairs per optimizer step.
        beta: how much a departure from the reference costs; larger holds the policy closer to it.

    Raises:
        ConfigError: a setting is out of range.
        DataError: ``pairs`` is empty, or the backend refuses a Datum.
    """
    check_schedule("dpo", epochs, batch_size, learning_rate)
    if not (math.isfinite(beta) and beta > 0):
        raise ConfigError(f"dpo needs beta > 0, got {beta}")
    if not pairs:
        raise DataError("dpo has no pairs to train on; give at least one preference")
    settings = DpoSettings(
        types.AdamParams(eps=defaults.EPS), LearningRate(learning_rate, decay="linear"), beta, batch_size, epochs, seed
    )
    history: list[DpoStep] = []

    async def record(taken: Taken) -> None:
        history.append(_dpo_step(taken))
        if on_step is not None:
            on_step(history[-1])

    await run_steps(backend, dpo_steps(await with_reference(backend, pairs), settings), on_step=record)
    return history


@dataclass(frozen=True, slots=True)
class DpoSettings:
    """How pairs are trained on.

    Attributes:
        adam: of every optimizer step, except for the learning rate.
        rate: the learning rate.
        beta: how much a departure from the reference costs.
        batch_size: pairs of one optimizer step.
        passes: passes over the pairs.
        seed: for the order of the pairs in each pass.
        step_size: multiplies the learning rate; only its warm-up applies.
    """

    adam: types.AdamParams
    rate: LearningRate
    beta: float = 0.1
    batch_size: int = 8
    passes: int = 1
    seed: int | str = 0
    step_size: StepSize = field(default_factory=StepSize)


async def dpo_steps(pairs: Sequence[Pair], settings: DpoSettings) -> Steps:
    """The optimizer steps on pairs that carry their reference's logprobs; see ``with_reference``."""
    loss = dpo_loss(settings.beta)
    total = count_steps(len(pairs), settings.passes, settings.batch_size)
    batches = epoch_batches(len(pairs), settings.passes, settings.batch_size, settings.seed)
    for number, (epoch, members) in enumerate(batches, start=1):
        data = [datum for index in members for datum in pairs[index]]
        learning_rate = settings.step_size.next * settings.rate.at_step(number, total)
        yield Step(
            data=data,
            loss=loss,
            adam=settings.adam.model_copy(update={"learning_rate": learning_rate}),
            number=number,
            total=total,
            epoch=epoch,
            members=members,
            sampled_tokens=sum(reply_tokens(datum) for datum in data),
            mean_over=len(members),
            share=len(members) / (len(pairs) * settings.passes),
        )
        settings.step_size.taken += 1


def _dpo_step(taken: Taken) -> DpoStep:
    step, values = taken.step, taken.metrics.values
    return DpoStep(
        step=step.number,
        total_steps=step.total,
        epoch=step.epoch,
        pairs=len(step.members),
        loss=values["loss:mean"],
        accuracy=values["accuracy:mean"],
        margin=values["margin:mean"],
        chosen_reward=values["chosen_reward:mean"],
        rejected_reward=values["rejected_reward:mean"],
        learning_rate=step.adam.learning_rate,
        grad_norm=values.get("grad_norm", math.nan),
    )


def _log_ratio(datum: Datum, logprobs: torch.Tensor) -> torch.Tensor:
    """log p(reply) - log p_ref(reply): a float64 scalar, since it is a small difference of large sums."""
    inputs = datum.loss_fn_inputs
    gap = logprobs.double() - inputs[REFERENCE].to_torch().double()
    return (gap * inputs["weights"].to_torch().double()).sum()


def _float32(values: TensorData) -> TensorData:
    return TensorData.from_numpy(np.asarray(values.to_numpy(), dtype=np.float32))
