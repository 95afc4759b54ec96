"""Log-probabilities of targets at rows of hidden states, in chunks: no [rows, vocabulary] tensor outlives its chunk.

For one row with logits ``z = s * (h W^T + b)`` and ``p = softmax(z)``, ``d log p[t] / d h = s * (W[t] - p W)``; a
temperature divides s. ``p W`` is taken in the forward pass while p is there, so the backward pass needs no second look
at the vocabulary; without b it gives the entropy, too, as ``logsumexp(z) - s * h . p W``. A soft cap
``c * tanh(z / c)`` multiplies both terms of the gradient by ``1 - (z_capped / c)^2``.

A row's own targets are left out of the product ``p W``, and their share is added in fp32: of a confident target
``(1 - p[t]) W[t]`` remains, which is less than what rounding ``p W`` to bf16 loses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nat_plugin_evsys.engine.machine.products import product, transposed
from nat_plugin_evsys.engine.model.forward import CHUNK_ELEMENTS, OutputHead
from nat_plugin_evsys.engine.model.lora import LoraAdapter, applied


@dataclass(frozen=True)
class Pairs:
    """Which targets are wanted at which rows, each pair once.

    Attributes:
        rows: (P,) rows of the hidden states, not falling.
        targets: (P,) token ids.
    """

    rows: Tensor
    targets: Tensor

    def select(self, wanted: Tensor) -> Pairs:
        """The pairs of a bool (P,)."""
        return Pairs(self.rows[wanted], self.targets[wanted])


def pair_logprobs(
    head: OutputHead,
    adapter: LoraAdapter | None,
    hidden: Tensor,
    pairs: Pairs,
    read: Tensor,
    temperature: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``(logprobs (P,) fp32, entropy (T,) fp32 in nats, without gradient)``.

    Args:
        head: the output head; frozen but for the adapter.
        adapter: the adapter that the head runs with.
        hidden: [T, H].
        pairs: the targets.
        read: (P,) bool. Logprobs of the other pairs are constants. Rows with no read pair get entropy 0.
        temperature: (T,) fp32 that divides each row's logits; None means 1.
    """
    logprobs = hidden.new_zeros(len(pairs.rows), dtype=torch.float32)
    entropy = hidden.new_zeros(len(hidden), dtype=torch.float32)
    row_read = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device)
    row_read[pairs.rows[read]] = True
    of_read_row = row_read[pairs.rows]
    adapted = adapter is not None and head.name in adapter.weights
    for index, with_grad in ((~of_read_row, False), (of_read_row, torch.is_grad_enabled())):
        if not bool(index.any()):
            continue
        part = pairs.select(index)
        rows, local = torch.unique_consecutive(part.rows, return_inverse=True)
        here, of_rows = Pairs(local, part.targets), None if temperature is None else temperature[rows]
        if not with_grad:
            want_entropy = index is of_read_row
            lp, h = _constant_logprobs(head, adapter, hidden.detach()[rows], here, of_rows, want_entropy=want_entropy)
        elif adapted:
            lp, h = _plain_logprobs(head, adapter, hidden[rows], here, of_rows)
        else:
            lp, h = _TargetLogprobs.apply(hidden[rows], here, head, of_rows)  # type: ignore[no-untyped-call]  # torch gives apply() no types
        logprobs = logprobs.masked_scatter(index, lp)
        entropy[rows] = h.detach() * row_read[rows]
    return logprobs, entropy


def _chunks(rows: int, pairs: Pairs, vocab_size: int) -> list[tuple[slice, slice]]:
    """``(rows, pairs)`` of each chunk of rows."""
    starts = torch.arange(0, rows + 1, max(1, CHUNK_ELEMENTS // vocab_size), device=pairs.rows.device)
    bounds = [*starts.tolist(), rows] if int(starts[-1]) < rows else starts.tolist()
    at = torch.searchsorted(pairs.rows, torch.tensor(bounds, device=pairs.rows.device)).tolist()
    return [(slice(bounds[i], bounds[i + 1]), slice(at[i], at[i + 1])) for i in range(len(bounds) - 1)]


def _constant_logprobs(
    head: OutputHead,
    adapter: LoraAdapter | None,
    hidden: Tensor,
    pairs: Pairs,
    temperature: Tensor | None,
    *,
    want_entropy: bool,
) -> tuple[Tensor, Tensor]:
    """Without gradient; entropy 0 unless it is wanted."""
    logprobs = hidden.new_empty(len(pairs.rows), dtype=torch.float32)
    entropy = hidden.new_zeros(len(hidden), dtype=torch.float32)
    with torch.no_grad(), applied(adapter):
        for rows, span in _chunks(len(hidden), pairs, head.linear.weight.shape[0]):
            at = (pairs.rows[span] - rows.start, pairs.targets[span])
            logits = head(hidden[rows], None if temperature is None else temperature[rows])
            wanted = logits[at]
            if want_entropy:
                normaliser = torch.logsumexp(logits, dim=-1)
                entropy[rows] = normaliser - _row_dots(logits, torch.softmax(logits, dim=-1))
            else:
                normaliser = _softmax_in_place(logits)
            logprobs[span] = wanted - normaliser[at[0]]
    return logprobs, entropy


def _softmax_in_place(logits: Tensor) -> Tensor:
    """Returns their log-sum-exp (R,). Several times faster than ``exp`` and ``sum``: one kernel that stays in cache."""
    largest = logits.amax(dim=-1)
    torch.softmax(logits, dim=-1, out=logits)
    # The largest probability is 1 / sum(exp(z - largest)).
    return largest - logits.amax(dim=-1).log_()


def _plain_logprobs(
    head: OutputHead, adapter: LoraAdapter | None, hidden: Tensor, pairs: Pairs, temperature: Tensor | None
) -> tuple[Tensor, Tensor]:
    """By autograd; a chunk that needs gradient is computed again in the backward pass."""
    logprobs, entropies = [], []
    for rows, span in _chunks(len(hidden), pairs, head.linear.weight.shape[0]):
        at = (pairs.rows[span] - rows.start, pairs.targets[span])
        arguments = (head, adapter, hidden[rows], at, None if temperature is None else temperature[rows])
        if torch.is_grad_enabled():
            lp, h = checkpoint(_plain_chunk, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            lp, h = _plain_chunk(*arguments)
        logprobs.append(lp)
        entropies.append(h)
    return torch.cat(logprobs), torch.cat(entropies)


def _plain_chunk(
    head: OutputHead,
    adapter: LoraAdapter | None,
    hidden: Tensor,
    at: tuple[Tensor, Tensor],
    temperature: Tensor | None,
) -> tuple[Tensor, Tensor]:
    # The backward pass runs this again, on a GPU in a thread of autograd's own: so the adapter is set here.
    with applied(adapter):
        logits = head(hidden, temperature)
    normaliser = torch.logsumexp(logits, dim=-1)
    logprobs = logits[at] - normaliser[at[0]]
    with torch.no_grad():
        shifted = logits - normaliser[:, None]
        entropy = -_row_dots(shifted.exp(), shifted)
    return logprobs, entropy


class _TargetLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, pairs: Pairs, head: OutputHead, temperature: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        weight = head.linear.weight
        logprobs = hidden.new_empty(len(pairs.rows), dtype=torch.float32)
        entropy = hidden.new_empty(len(hidden), dtype=torch.float32)
        others = torch.empty_like(hidden)  # p W without the targets' share
        own = torch.empty_like(logprobs)  # p of each target
        slopes = torch.empty_like(logprobs) if head.softcap is not None else None
        scale = torch.full_like(entropy, head.scale)
        if temperature is not None:
            scale /= temperature
        logits = None
        for rows, span in _chunks(len(hidden), pairs, weight.shape[0]):
            del logits  # before the next ones, which then take its memory
            of_rows = None if temperature is None else temperature[rows]
            logits = _frozen_logits(head, hidden[rows], of_rows)
            at = (pairs.rows[span] - rows.start, pairs.targets[span])
            slope = None if head.softcap is None else _slope(logits, head.softcap, of_rows)
            wanted, kept = logits[at], None if head.is_linear else logits.clone()
            normaliser = _softmax_in_place(logits)
            logprobs[span] = wanted - normaliser[at[0]]
            expected = None if kept is None else _row_dots(kept, logits)
            own[span] = logits[at]
            if slope is not None and slopes is not None:
                slopes[span] = slope[at]
                logits.mul_(slope)
            logits[at] = 0.0
            others[rows] = _expected_embedding(logits, weight)
            if expected is None:
                expected = _row_dots(hidden[rows].float(), others[rows].float()).mul_(scale[rows])
                expected.index_add_(0, at[0], own[span] * wanted)
            entropy[rows] = normaliser - expected
        ctx.save_for_backward(others, own, scale, pairs.rows, pairs.targets, weight, slopes)
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy.clamp_(min=0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        others, own, scale, rows, targets, weight, slopes = ctx.saved_tensors
        grad = grad * scale[rows]
        total = grad.new_zeros(len(others)).index_add_(0, rows, grad)
        out = others.float() * -total[:, None]
        grad -= total[rows] * own
        if slopes is not None:
            grad *= slopes
        step = max(1, CHUNK_ELEMENTS // others.shape[1])
        for r, t, g in zip(rows.split(step), targets.split(step), grad.split(step), strict=True):
            out.index_add_(0, r, weight[t].float().mul_(g[:, None]))
        return out.to(others.dtype), None, None, None


def _frozen_logits(head: OutputHead, hidden: Tensor, temperature: Tensor | None) -> Tensor:
    """``head(hidden, temperature)`` without an adapter."""
    weight = head.linear.weight
    if not _is_plain_fp32(weight) or not head.is_linear:
        with applied(None):
            return head(hidden, temperature)
    if temperature is not None:
        hidden = hidden / temperature[:, None]  # in fp32 as exact as to divide the logits, which are more
    logits = product(hidden, weight)
    return logits if head.scale == 1.0 else logits.mul_(head.scale)


def _slope(logits: Tensor, softcap: float, temperature: Tensor | None) -> Tensor:
    """What the soft cap multiplies the gradient by, [R, V]."""
    capped = logits if temperature is None else logits * temperature[:, None]
    return 1 - (capped / softcap).square_()


def _expected_embedding(probabilities: Tensor, weight: Tensor) -> Tensor:
    """``p W``: [R, V] -> [R, H], in W's dtype."""
    if _is_plain_fp32(weight):
        return product(probabilities, transposed(weight))
    return probabilities.to(weight.dtype) @ weight


def _is_plain_fp32(weight: Tensor) -> bool:
    return weight.dtype == torch.float32 and weight.device.type == "cpu"


def _row_dots(a: Tensor, b: Tensor) -> Tensor:
    """Dot product of each row of two [R, V], without a third."""
    return torch.bmm(a[:, None, :], b[:, :, None]).view(-1)
