"""Self-distillation finetuning: the model learns from itself with a demonstration in context.

For a prompt x with a demonstration c, the student samples y from p(. | x). The teacher is the same model with c put
into its prompt, q = p(. | x, c), without gradient. The loss is the reverse KL at every position of the student's own
sample, summed over positions:

    L = sum_t KL(p_t || q_t) = sum_t sum_v p_t(v) (log p_t(v) - log q_t(v)),    p_t = p(. | x, y_<t)

It is *analytic*: the inner sum is computed, over the K tokens that were likeliest when the student sampled and, with
``tail``, all others as one outcome (``reverse_kl`` states what that means; with K the vocabulary it is the full KL).

Source: SDFT, arXiv 2601.19897 (its analytic per-token estimator); top-K with a tail as in SDPO, arXiv 2601.20802.
Simplified: the teacher runs on the student's present weights, not on an average of past ones; the gradient does not go
through the sampling of y, as in the paper's default.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tinker import Datum, ModelInput, types

from nat_plugin_evsys.backends.base import Backend, SamplingClient
from nat_plugin_evsys.errors import ConfigError, DataError
from nat_plugin_evsys.rollouts.episodes import text_of
from nat_plugin_evsys.rollouts.seeds import rollout_seed
from nat_plugin_evsys.runtime import defaults
from nat_plugin_evsys.training.learning_rate import LearningRate
from nat_plugin_evsys.training.loop import Step, Steps, Taken, run_steps
from nat_plugin_evsys.training.reverse_kl import CandidateSample, candidate_datum, reverse_kl_loss, sampled_rows
from nat_plugin_evsys.training.schedule import check_schedule, count_steps, epoch_batches
from nat_plugin_evsys.training.sft import Message, Render, messages_of

DEMONSTRATION = "\n\nThis is an example of a response:\n{demonstration}\n\nNow answer with a response of your own."

Teach = Callable[[list[Message], Message], list[Message]]
"""``(messages before the demonstration, demonstration) -> the teacher's messages``."""


@dataclass(frozen=True, slots=True)
class Lesson:
    """One demonstration as token ids: the student's prompt, and the teacher's with the demonstration in it."""

    student_ids: list[int]
    teacher_ids: list[int]


@dataclass(frozen=True, slots=True)
class SdftStep:
    """One optimizer step.

    Attributes:
        step: from 1 to ``total_steps``.
        total_steps: steps of the whole training.
        epoch: from 1.
        loss: mean reverse KL of a sampled position, nats, before the step.
        tokens: sampled positions of the batch.
        tail_mass: mean probability that the student gives to tokens outside the candidates.
        policy_version: the version that sampled.
        learning_rate: of this step.
        grad_norm: norm of the summed gradient, before any clipping.
    """

    step: int
    total_steps: int
    epoch: int
    loss: float
    tokens: int
    tail_mass: float
    policy_version: int
    learning_rate: float
    grad_norm: float


def demonstration_in_context(messages: list[Message], demonstration: Message) -> list[Message]:
    """The messages with the demonstration written at the end of the last user message.

    Raises:
        DataError: there is no user message.
    """
    last = next((i for i in reversed(range(len(messages))) if messages[i].get("role") == "user"), None)
    if last is None:
        raise DataError("there is no user message to put the demonstration into; give a `teach` function of your own")
    calls = [json.dumps(call.get("function", call)) for call in demonstration.get("tool_calls") or []]
    shown = "\n".join(part for part in (text_of(demonstration.get("content")), *calls) if part)
    text = text_of(messages[last].get("content")) + DEMONSTRATION.format(demonstration=shown)
    return [*messages[:last], {**messages[last], "content": text}, *messages[last + 1 :]]


def build_lessons(
    examples: Sequence[Mapping[str, Any]], render: Render, teach: Teach = demonstration_in_context
) -> list[Lesson]:
    """One lesson an example: its last assistant message is the demonstration, what comes before it the prompt.

    Args:
        examples: ``{"messages": [...], "tools": [...]}`` in OpenAI form, as for ``sft``.
        render: makes a prompt's ids.
        teach: writes the demonstration into the teacher's prompt.

    Raises:
        DataError: an example has no assistant message with something before it.
    """
    lessons = []
    for index, example in enumerate(examples):
        messages = messages_of(example, index)
        at = next((i for i in reversed(range(len(messages))) if messages[i].get("role") == "assistant"), 0)
        if at == 0:
            raise DataError(f"examples[{index}] has no assistant message after a prompt; sdft needs a demonstration")
        tools, before = list(example.get("tools") or []), messages[:at]
        lessons.append(Lesson(list(render(before, tools)), list(render(teach(before, messages[at]), tools))))
    return lessons


async def train_sdft(
    backend: Backend,
    lessons: Sequence[Lesson],
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    sampling: types.SamplingParams,
    candidates: int = 64,
    tail: bool = True,
    seed: int = 0,
    on_step: Callable[[SdftStep], None] | None = None,
) -> list[SdftStep]:
    """Sample once for each lesson of a batch, then one step on the reverse KL to the teacher.

    The learning rate falls linearly, as in ``train_sft``. The gradient is that of the *sum* over sampled positions.

    Args:
        batch_size: lessons per optimizer step.
        sampling: max_tokens, stop and temperature of the student's samples. ``top_k``, ``top_p`` and ``seed`` must be
            left alone: the candidates come from the whole distribution, and seeds derive from ``seed``.
        candidates: K, at most the vocabulary.
        tail: count all other tokens as one more outcome.

    Raises:
        ConfigError: a setting is out of range.
        DataError: ``lessons`` is empty, or the backend refuses a Datum or K.
    """
    check_schedule("sdft", epochs, batch_size, learning_rate)
    if candidates < 1 or sampling.top_k > 0 or sampling.top_p < 1 or sampling.seed is not None:
        raise ConfigError(
            "sdft needs candidates >= 1 and sampling with top_k=-1, top_p=1, seed=None; got "
            f"{candidates}, {sampling.top_k}, {sampling.top_p}, {sampling.seed}"
        )
    if not lessons:
        raise DataError("sdft has no lessons to train on; give at least one demonstration")
    history: list[SdftStep] = []

    async def record(taken: Taken) -> None:
        history.append(_sdft_step(taken))
        if on_step is not None:
            on_step(history[-1])

    rate = LearningRate(learning_rate, decay="linear")
    student = _Student(backend, sampling, candidates, seed)
    await run_steps(backend, _sdft_steps(student, lessons, epochs, batch_size, rate, tail=tail), on_step=record)
    return history


async def _sdft_steps(
    student: _Student, lessons: Sequence[Lesson], epochs: int, batch_size: int, rate: LearningRate, *, tail: bool
) -> Steps:
    """The optimizer steps of ``train_sdft``; each samples from the weights that the one before left."""
    loss = reverse_kl_loss(tail=tail)
    total = count_steps(len(lessons), epochs, batch_size)
    batches = epoch_batches(len(lessons), epochs, batch_size, student.seed)
    for number, (epoch, members) in enumerate(batches, start=1):
        data, version = await student.practise([lessons[index] for index in members], number - 1)
        yield Step(
            data=data,
            loss=loss,
            adam=types.AdamParams(learning_rate=rate.at_step(number, total), eps=defaults.EPS),
            number=number,
            total=total,
            epoch=epoch,
            members=members,
            share=1 / total,
            policy_version=version,
        )


def _sdft_step(taken: Taken) -> SdftStep:
    step, values = taken.step, taken.metrics.values
    return SdftStep(
        step=step.number,
        total_steps=step.total,
        epoch=step.epoch,
        loss=values["reverse_kl:mean"],
        tokens=round(values["positions:sum"]),
        tail_mass=values["tail_mass:mean"],
        policy_version=-1 if step.policy_version is None else step.policy_version,
        learning_rate=step.adam.learning_rate,
        grad_norm=values.get("grad_norm", math.nan),
    )


@dataclass(frozen=True, slots=True)
class _Student:
    """Samples replies to lessons, and lets the teacher look at them."""

    backend: Backend
    sampling: types.SamplingParams
    candidates: int
    seed: int

    async def practise(self, lessons: Sequence[Lesson], number: int) -> tuple[list[Datum], int]:
        """One reply to each lesson with the teacher's logprobs, and the policy version that gave them."""
        client = await self.backend.snapshot_sampling_client()
        seeds = [rollout_seed(self.seed, f"sdft/{number}", str(x.student_ids), i) for i, x in enumerate(lessons)]
        samples = await asyncio.gather(
            *(
                _sample(client, lesson.student_ids, self.sampling.model_copy(update={"seed": s}), self.candidates)
                for lesson, s in zip(lessons, seeds, strict=True)
            )
        )
        return await _taught(self.backend, lessons, samples), client.policy_version


async def _sample(
    client: SamplingClient, prompt_ids: list[int], sampling: types.SamplingParams, candidates: int
) -> CandidateSample:
    prompt = ModelInput.from_ints(prompt_ids)
    response = await client.sample_async(prompt, 1, sampling, topk_sample_logprobs=candidates)
    sequence = response.sequences[0]
    if sequence.topk_logprobs_np is None:
        raise DataError("the backend's sampler gave no topk_sample_logprobs, which sdft needs for its candidates")
    return CandidateSample(list(sequence.tokens), sequence.topk_logprobs_np.token_ids)


async def _taught(backend: Backend, lessons: Sequence[Lesson], samples: Sequence[CandidateSample]) -> list[Datum]:
    """The students' Datums with the teacher's logprobs, by the present weights, of the same tokens."""
    data = [candidate_datum(lesson.teacher_ids, sample) for lesson, sample in zip(lessons, samples, strict=True)]
    outputs = (await backend.forward_async(data, loss_fn="cross_entropy")).loss_fn_outputs
    return [
        candidate_datum(lesson.student_ids, sample, sampled_rows(output["logprobs"], sample))
        for lesson, sample, output in zip(lessons, samples, outputs, strict=True)
    ]
