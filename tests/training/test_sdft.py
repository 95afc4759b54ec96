"""Self-distillation: the reverse KL and its gradient against full-vocabulary autograd, and a student that learns."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tinker import types

from nat_plugin_evsys.errors import ConfigError, DataError
from nat_plugin_evsys.training.reverse_kl import (
    EMPTY_TAIL,
    TEACHER,
    CandidateSample,
    candidate_datum,
    reverse_kl,
    reverse_kl_loss,
    sampled_rows,
)
from nat_plugin_evsys.training.sdft import SdftStep, build_lessons, demonstration_in_context, train_sdft

VOCAB = 259
LESSONS = [
    ([257, 65, 66, 256, 258], [257, 65, 66, 67, 68, 256, 258], [70, 71, 72]),
    ([257, 90, 258], [257, 80, 81, 90, 258], [33, 34, 35, 36, 256]),
]
"""``(student prompt, teacher prompt, sampled tokens)``."""


def distributions(seed: int, rows: int, vocab: int, spread: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(rows, vocab, generator=generator, dtype=torch.float64) * spread for _ in range(2))
    return student.log_softmax(-1), teacher.log_softmax(-1)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    vocab=st.integers(2, 40),
    share=st.floats(0.0, 1.0),
    spread=st.floats(0.1, 4.0),
)
def test_with_a_tail_it_is_a_divergence_that_never_exceeds_the_full_one(
    seed: int, vocab: int, share: float, spread: float
) -> None:
    student, teacher = distributions(seed, 3, vocab, spread)
    full = torch.nn.functional.kl_div(teacher, student, log_target=True, reduction="none").sum(-1)
    candidates = student.topk(max(1, round(share * vocab)), dim=-1).indices
    found = reverse_kl(student.gather(1, candidates), teacher.gather(1, candidates))
    assert bool((found >= -1e-9).all())
    # A student's tail below EMPTY_TAIL is left out, and with it the term mass * log(mass / the teacher's tail <= 1).
    assert bool((found <= full + EMPTY_TAIL * math.log(1 / EMPTY_TAIL) + 1e-9).all())
    if candidates.shape[1] == vocab:
        torch.testing.assert_close(found, full)


def test_without_a_tail_only_the_candidates_count() -> None:
    student, teacher = distributions(0, 4, 10, 1.0)
    candidates = student.topk(3, dim=-1).indices
    s, t = student.gather(1, candidates), teacher.gather(1, candidates)
    torch.testing.assert_close(reverse_kl(s, t, tail=False), (s.exp() * (s - t)).sum(-1))
    assert not torch.allclose(reverse_kl(s, t), reverse_kl(s, t, tail=False))


def test_the_datum_asks_for_candidates_where_tokens_were_sampled() -> None:
    sample = CandidateSample([7, 8], np.array([[7, 1], [8, 2]], dtype=np.int32))
    datum = candidate_datum([3, 4, 5], sample, np.array([[-1.0, -2.0], [-3.0, -4.0]]))
    assert datum.model_input.to_ints() == [3, 4, 5, 7]
    inputs = {key: value.to_numpy().reshape(4, 2).tolist() for key, value in datum.loss_fn_inputs.items()}
    assert inputs == {
        "target_tokens": [[0, 0], [0, 0], [7, 1], [8, 2]],
        "weights": [[0, 0], [0, 0], [1, 1], [1, 1]],
        TEACHER: [[0, 0], [0, 0], [-1, -2], [-3, -4]],
    }


async def taught(backend: Any, width: int, full_logprobs: Any) -> list[types.Datum]:
    """The Datums of LESSONS with the ``width`` likeliest candidates of the student, as ``train_sdft`` makes them."""
    data = []
    for student, teacher, tokens in LESSONS:
        rows = full_logprobs(backend, [*student, *tokens][:-1])[len(student) - 1 :]
        sample = CandidateSample(tokens, rows.topk(width, dim=-1).indices.numpy())
        output = await backend.forward_async([candidate_datum(teacher, sample)], loss_fn="cross_entropy")
        seen = sampled_rows(output.loss_fn_outputs[0]["logprobs"], sample)
        data.append(candidate_datum(student, sample, seen))
    return data


def full_losses(backend: Any, full_logprobs: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """``(student (T, V) with gradient, teacher (T, V) without)`` of each lesson."""
    pairs = []
    for student, teacher, tokens in LESSONS:
        p = full_logprobs(backend, [*student, *tokens][:-1])[len(student) - 1 :]
        q = full_logprobs(backend, [*teacher, *tokens][:-1])[len(teacher) - 1 :].detach()
        pairs.append((p, q))
    return pairs


@pytest.mark.parametrize("tail", [True, False])
async def test_with_the_whole_vocabulary_loss_and_gradient_are_the_full_ones(
    tail: bool, make_backend: Any, full_logprobs: Any, gradient_error: Any
) -> None:
    backend = await make_backend(perturbed=True)
    data = await taught(backend, VOCAB, full_logprobs)
    output = await backend.forward_backward_custom_async(data, reverse_kl_loss(tail=tail))
    loss = torch.stack([(p.exp() * (p - q)).sum() for p, q in full_losses(backend, full_logprobs)]).sum()
    assert output.metrics["loss:sum"] == pytest.approx(loss.item(), rel=1e-5)
    assert output.metrics["positions:sum"] == 8
    assert output.metrics["tail_mass:mean"] < 1e-5
    assert gradient_error(backend, loss) < 1e-5


@pytest.mark.parametrize("width", [1, 8, 64])
async def test_with_fewer_candidates_it_is_the_full_computation_on_candidates_and_rest(
    width: int, make_backend: Any, full_logprobs: Any, gradient_error: Any
) -> None:
    """The reference sums the probability of every other token one by one, with gradient."""
    backend = await make_backend(perturbed=True)
    data = await taught(backend, width, full_logprobs)
    output = await backend.forward_backward_custom_async(data, reverse_kl_loss())
    loss = torch.zeros((), dtype=torch.float64)
    for p, q in full_losses(backend, full_logprobs):
        order = p.detach().argsort(dim=-1, descending=True)
        p, q = (x.exp().gather(1, order) for x in (p, q))
        p, q = (torch.cat([x[:, :width], x[:, width:].sum(-1, keepdim=True)], dim=1) for x in (p, q))
        loss = loss + (p * (p / q).log()).sum()
    assert output.metrics["loss:sum"] == pytest.approx(loss.item(), rel=1e-5)
    assert gradient_error(backend, loss) < 1e-5


EXAMPLES: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": f"say {word}"}, {"role": "assistant", "content": word}]}
    for word in ("sun", "moon", "sea")
]


def test_a_lesson_shows_the_demonstration_to_the_teacher_only(render: Any) -> None:
    (lesson, *_), tokens = build_lessons(EXAMPLES, render), [115, 117, 110]
    assert lesson.student_ids == render(EXAMPLES[0]["messages"][:1])
    assert len(lesson.teacher_ids) > len(lesson.student_ids) + len(tokens)
    shown = demonstration_in_context(
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
        {"role": "assistant", "content": "d", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
    )
    assert [m["role"] for m in shown] == ["user", "assistant", "user"]
    assert shown[0]["content"] == "a"
    assert shown[2]["content"].startswith("c\n\nThis is an example of a response:\nd\n{")


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({}, "no list of messages"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no assistant message after a prompt"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "no assistant message after a prompt"),
        ({"messages": [{"role": "system", "content": "x"}, {"role": "assistant", "content": "y"}]}, "no user message"),
    ],
)
def test_bad_demonstrations(example: Any, message: str, render: Any) -> None:
    with pytest.raises(DataError, match=message):
        build_lessons([*EXAMPLES, example], render)


SETTINGS: dict[str, Any] = {
    "epochs": 12,
    "batch_size": 3,
    "learning_rate": 1e-2,
    "sampling": types.SamplingParams(max_tokens=8),
    "seed": 3,
}


async def test_the_student_comes_closer_to_the_teacher_repeatably(make_backend: Any, render: Any) -> None:
    lessons = build_lessons(EXAMPLES, render)
    seen: list[SdftStep] = []
    # Row by row, so that all sums are taken alike: how concurrent requests share a batch depends on the clock.
    one, two = [await make_backend(perturbed=True, max_batch_size=1) for _ in range(2)]
    first = await train_sdft(one, lessons, **SETTINGS, on_step=seen.append)
    again = await train_sdft(two, lessons, **SETTINGS)
    assert seen == first
    assert [s.loss for s in first] == pytest.approx([s.loss for s in again], rel=1e-3)
    assert [s.step for s in first] == list(range(1, 13))
    assert [s.policy_version for s in first] == list(range(12))
    assert first[0].learning_rate == 1e-2
    assert all(0 < s.tokens <= 24 and 0 < s.tail_mass < 1 for s in first)
    assert sum(s.loss for s in first[-3:]) < 0.5 * sum(s.loss for s in first[:3])


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"candidates": 0},
        {"sampling": types.SamplingParams(max_tokens=4, top_k=5)},
        {"sampling": types.SamplingParams(max_tokens=4, top_p=0.9)},
        {"sampling": types.SamplingParams(max_tokens=4, seed=1)},
    ],
)
async def test_bad_sdft_settings(wrong: dict[str, Any], make_backend: Any, render: Any) -> None:
    with pytest.raises(ConfigError, match="sdft needs"):
        await train_sdft(await make_backend(), build_lessons(EXAMPLES, render), **{**SETTINGS, **wrong})


async def test_no_lessons_or_too_many_candidates(make_backend: Any, render: Any) -> None:
    with pytest.raises(DataError, match="no lessons"):
        await train_sdft(await make_backend(), [], **SETTINGS)
    with pytest.raises(DataError, match="topk_sample_logprobs must lie"):
        await train_sdft(await make_backend(), build_lessons(EXAMPLES, render), **SETTINGS, candidates=VOCAB + 1)


async def test_the_documents_worked_example_has_the_same_loss(make_backend: Any, full_logprobs: Any) -> None:
    """The first code block of docs/custom-losses.md, run as it stands."""
    text = (Path(__file__).parents[2] / "docs" / "custom-losses.md").read_text(encoding="utf-8")
    scope: dict[str, Any] = {}
    exec(text.split("```python\n")[1].split("```")[0], scope)
    backend = await make_backend(perturbed=True)
    data = await taught(backend, 8, full_logprobs)
    written = await backend.forward_backward_custom_async(data, scope["reverse_kl"])
    gradient = {name: g.clone() for name, g in backend._model.gradient.items()}
    await backend.discard_gradient_async()
    used = await backend.forward_backward_custom_async(data, reverse_kl_loss())
    assert written.metrics["loss:sum"] == pytest.approx(used.metrics["loss:sum"], rel=1e-5)
    for name, g in backend._model.gradient.items():
        torch.testing.assert_close(gradient[name], g, rtol=1e-4, atol=1e-5)
