"""The analytic reverse KL of a student to a teacher, as a custom loss over the logprobs of candidates.

    KL(p || q) = sum_v p(v) (log p(v) - log q(v))

A loss over logprobs sees only those of the target_tokens that it asks for. So a Datum asks for K candidates at each
sampled position, target_tokens (N, K), and the sum over them is computed, not estimated from the one token that was
sampled. With ``tail`` all other tokens together count as one more outcome: the result is then the exact KL of the two
distributions on those K + 1 outcomes, never negative and never above the full KL (data processing inequality). With K
the vocabulary it *is* the full KL, and its gradient that of the full computation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from tinker import Datum, ModelInput, TensorData

from nat_plugin_evsys.backends.base import LossCallable

if TYPE_CHECKING:
    import torch

TEACHER = "teacher_logprobs"
"""Name of the teacher's logprobs of the candidates in ``loss_fn_inputs``, shape (N, K) as the target_tokens."""

EMPTY_TAIL = 1e-5
"""A probability outside the candidates that is below this is taken for rounding: no tail."""


@dataclass(frozen=True, slots=True)
class CandidateSample:
    """A sampled sequence with the candidates of each of its positions.

    Attributes:
        tokens: sampled token ids, length T.
        candidates: token ids, shape (T, K); no id twice in a row.
    """

    tokens: list[int]
    candidates: np.ndarray[Any, Any]


def candidate_datum(
    prompt_ids: Sequence[int], sample: CandidateSample, teacher: np.ndarray[Any, Any] | None = None
) -> Datum:
    """A Datum that asks for the candidates' logprobs at each sampled position after a prompt of P tokens.

    Of shape (N, K) with N = P + T - 1, the last T rows being the sampled positions: ``target_tokens`` are the
    candidates there and token 0 in the prompt's rows, ``weights`` 1 there and 0 in the prompt's rows, and ``TEACHER``,
    if given, ``teacher`` (T, K) there and 0 in the prompt's rows.
    """
    pad = ((len(prompt_ids) - 1, 0), (0, 0))
    rows = {"target_tokens": sample.candidates.astype(np.int64), "weights": np.ones(sample.candidates.shape)}
    if teacher is not None:
        rows[TEACHER] = teacher
    inputs: Any = {key: TensorData.from_numpy(np.pad(_wire(value), pad)) for key, value in rows.items()}
    return Datum(ModelInput.from_ints([*prompt_ids, *sample.tokens][:-1]), inputs)


def sampled_rows(logprobs: TensorData, sample: CandidateSample) -> np.ndarray[Any, Any]:
    """The (T, K) logprobs of the sampled positions out of the (N, K) that a ``candidate_datum`` gave."""
    return logprobs.to_numpy().reshape(-1, sample.candidates.shape[1])[-len(sample.tokens) :]


def reverse_kl(student: torch.Tensor, teacher: torch.Tensor, *, tail: bool = True) -> torch.Tensor:
    """KL of the student to the teacher over K candidates, and the rest as one outcome: ``(T, K), (T, K) -> (T,)``.

        sum_k p_k (log p_k - log q_k)  [+ p_tail (log p_tail - log q_tail),  p_tail = 1 - sum_k p_k]

    Where the student's tail is below ``EMPTY_TAIL`` there is none (1.2e-4 nats at most); the teacher's is never taken
    for smaller. Without
    ``tail`` the candidates' terms alone are summed, which is no divergence unless they are the whole vocabulary.
    """
    import torch

    kl = (student.exp() * (student - teacher)).sum(dim=-1)
    if not tail:
        return kl
    mass = _tail_mass(student)
    log_ratio = mass.clamp(min=EMPTY_TAIL).log() - _tail_mass(teacher).clamp(min=EMPTY_TAIL).log()
    return kl + torch.where(mass > EMPTY_TAIL, mass * log_ratio, torch.zeros_like(mass))


def reverse_kl_loss(*, tail: bool = True) -> LossCallable:
    """The sum of ``reverse_kl`` over all sampled positions, for ``forward_backward_custom_async``.

    The data are of ``candidate_datum``, with a teacher. Metrics, over the sampled positions: ``reverse_kl:mean``,
    ``tail_mass:mean`` (the student's probability outside the candidates) and ``positions:sum``.
    """

    def loss_fn(data: list[Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        import torch

        kls, masses = [], []
        for datum, rows in zip(data, logprobs, strict=True):
            sampled = datum.loss_fn_inputs["weights"].to_torch()[:, 0] != 0
            # float64: a KL is a small difference of larger sums.
            student, teacher = rows[sampled].double(), datum.loss_fn_inputs[TEACHER].to_torch()[sampled].double()
            kls.append(reverse_kl(student, teacher, tail=tail))
            masses.append(_tail_mass(student.detach()))
        kl = torch.cat(kls)
        metrics = {
            "reverse_kl:mean": float(kl.detach().mean()),
            "tail_mass:mean": float(torch.cat(masses).clamp(min=0).mean()),
            "positions:sum": float(len(kl)),
        }
        return kl.sum(), metrics

    return loss_fn


def _tail_mass(logprobs: torch.Tensor) -> torch.Tensor:
    """``1 - sum_k p_k`` of each row: (T, K) -> (T,); rounding may make it slightly negative."""
    return -logprobs.logsumexp(dim=-1).expm1()


def _wire(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return array if array.dtype == np.int64 else array.astype(np.float32)
