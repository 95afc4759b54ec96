"""Supervised finetuning on demonstrations: cross entropy on every assistant reply.

    L = -sum_t log p(token t | tokens before it), over the tokens of assistant replies only.

Source: Tinker's sl_loop (sum over tokens, learning rate falling linearly to zero). Simplified: every reply token weighs
1, and no packing of several conversations into one Datum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tinker import types

from nat_plugin_evsys.backends.base import Backend
from nat_plugin_evsys.errors import DataError
from nat_plugin_evsys.runtime import defaults
from nat_plugin_evsys.training.learning_rate import LearningRate
from nat_plugin_evsys.training.loop import NamedLoss, Step, Steps, Taken, run_steps
from nat_plugin_evsys.training.schedule import check_schedule, count_steps, epoch_batches

Message = Mapping[str, Any]
Render = Callable[[list[Message], list[Any]], list[int]]
"""``(messages, tools) -> prompt ids``, ending with the generation prompt of an assistant turn."""
RenderReply = Callable[[Message], list[int]]
"""``assistant message -> reply ids``, with the end-of-turn token."""


@dataclass(frozen=True)
class SftStep:
    """One optimizer step.

    Attributes:
        step: from 1 to ``total_steps``.
        total_steps: steps of the whole training.
        epoch: from 1.
        loss: mean negative log-likelihood of a reply token of the batch, nats, before the step.
        tokens: reply tokens of the batch.
        learning_rate: of this step.
        grad_norm: norm of the summed gradient, before any clipping.
    """

    step: int
    total_steps: int
    epoch: int
    loss: float
    tokens: int
    learning_rate: float
    grad_norm: float


def build_sft_datums(
    examples: Sequence[Mapping[str, Any]], render: Render, render_reply: RenderReply
) -> list[types.Datum]:
    """cross_entropy Datums with weight 1 on the tokens of assistant replies and 0 on all others.

    Args:
        examples: ``{"messages": [...], "tools": [...]}`` in OpenAI form; ``tools`` may be absent.
        render: makes a prompt's ids.
        render_reply: makes a reply's ids.

    Returns:
        Datums in the order of the examples. The turns of one conversation share a Datum as long as each prompt extends
        the tokens before it; where a chat template rewrites history, a new Datum begins.

    Raises:
        DataError: an example has no messages or no assistant message, or a reply renders to no tokens.
    """
    datums: list[types.Datum] = []
    for index, example in enumerate(examples):
        messages = messages_of(example, index)
        turns = list(_turns(messages, list(example.get("tools") or []), render, render_reply, f"examples[{index}]"))
        if not turns:
            raise DataError(f"examples[{index}] has no assistant message to learn from")
        datums.extend(_datum(tokens, mask) for tokens, mask in _merge(turns))
    return datums


def messages_of(example: Mapping[str, Any], index: int) -> list[Message]:
    """The example's messages; DataError, naming its index, if it has none."""
    messages = example.get("messages")
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise DataError(f"examples[{index}] has no list of messages; give {{'messages': [...], 'tools': [...]}}")
    return list(messages)


def reply_datum(prompt_ids: Sequence[int], reply_ids: Sequence[int]) -> types.Datum:
    """A cross_entropy Datum of one reply: shape (P + T - 1,), weight 1 on its T tokens and 0 on the P prompt tokens."""
    return _datum([*prompt_ids, *reply_ids], [0] * len(prompt_ids) + [1] * len(reply_ids))


def _turns(
    messages: Sequence[Message], tools: list[Any], render: Render, render_reply: RenderReply, where: str
) -> Iterator[tuple[list[int], list[int]]]:
    """``(prompt ids, reply ids)`` of each assistant message."""
    for position, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        prompt, reply = list(render(list(messages[:position]), tools)), list(render_reply(message))
        if not prompt or not reply:
            raise DataError(
                f"{where}: message {position} renders to {len(prompt)} prompt and {len(reply)} reply tokens"
            )
        yield prompt, reply


def _merge(turns: Sequence[tuple[list[int], list[int]]]) -> Iterator[tuple[list[int], list[int]]]:
    """``(tokens, mask)`` with mask 1 on reply tokens; a turn whose prompt extends the tokens so far joins them."""
    tokens: list[int] = []
    mask: list[int] = []
    for prompt, reply in turns:
        if prompt[: len(tokens)] != tokens:
            yield tokens, mask
            tokens, mask = [], []
        mask = mask + [0] * (len(prompt) - len(tokens)) + [1] * len(reply)
        tokens = prompt + reply
    yield tokens, mask


def _datum(tokens: list[int], mask: list[int]) -> types.Datum:
    """Position i of the Datum reads token i and predicts token i + 1."""
    inputs: dict[str, Any] = {"target_tokens": tokens[1:], "weights": [float(m) for m in mask[1:]]}
    return types.Datum(types.ModelInput.from_ints(tokens[:-1]), inputs)


async def train_sft(
    backend: Backend,
    datums: Sequence[types.Datum],
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int = 0,
    on_step: Callable[[SftStep], None] | None = None,
) -> list[SftStep]:
    """Train on ``datums``, reshuffled each epoch by ``seed``; the last batch of an epoch may be smaller.

    The learning rate falls linearly: step t of T (from 1) runs at ``learning_rate * (1 - (t - 1) / T)``. The gradient
    is that of the *sum* over the batch's tokens.

    Raises:
        ConfigError: a setting is out of range.
        DataError: ``datums`` is empty, or the backend refuses one.
    """
    check_schedule("sft", epochs, batch_size, learning_rate)
    if not datums:
        raise DataError("sft has no Datums to train on; give at least one demonstration")
    history: list[SftStep] = []

    async def record(taken: Taken) -> None:
        history.append(_sft_step(taken))
        if on_step is not None:
            on_step(history[-1])

    rate = LearningRate(learning_rate, decay="linear")
    await run_steps(backend, sft_steps(datums, epochs, batch_size, rate, seed), on_step=record)
    return history


async def sft_steps(
    datums: Sequence[types.Datum], epochs: int, batch_size: int, rate: LearningRate, seed: int
) -> Steps:
    """The optimizer steps of ``train_sft``."""
    total = count_steps(len(datums), epochs, batch_size)
    for number, (epoch, members) in enumerate(epoch_batches(len(datums), epochs, batch_size, seed), start=1):
        data = [datums[index] for index in members]
        yield Step(
            data=data,
            loss=NamedLoss("cross_entropy"),
            adam=types.AdamParams(learning_rate=rate.at_step(number, total), eps=defaults.EPS),
            number=number,
            total=total,
            epoch=epoch,
            members=members,
            sampled_tokens=sum(reply_tokens(datum) for datum in data),
            share=1 / total,
        )


def reply_tokens(datum: types.Datum) -> int:
    """Tokens of a Datum with a weight of 1."""
    return int(sum(datum.loss_fn_inputs["weights"].tolist()))


def _sft_step(taken: Taken) -> SftStep:
    step, values = taken.step, taken.metrics.values
    tokens = values["weights:sum"]
    return SftStep(
        step=step.number,
        total_steps=step.total,
        epoch=step.epoch,
        loss=values["loss:sum"] / tokens if tokens else 0.0,
        tokens=round(tokens),
        learning_rate=step.adam.learning_rate,
        grad_norm=values.get("grad_norm", math.nan),
    )
