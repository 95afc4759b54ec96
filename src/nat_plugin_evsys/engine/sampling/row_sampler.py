"""One token for each of some sequences, from their logits."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nat_plugin_evsys.engine.sampling.decoding import RowParams, draw, sampled_logprobs, uniforms
from nat_plugin_evsys.engine.sampling.request import SampleSequence
from nat_plugin_evsys.engine.sampling.result import top_columns
from nat_plugin_evsys.engine.sampling.shaping import shaped
from nat_plugin_evsys.errors import DataError


def row_params(
    rows: list[SampleSequence], vocab_size: int, device: torch.device, never: Tensor | None = None
) -> RowParams:
    """The sampling parameters of each row."""
    wanted = [(s.request.temperature, s.request.top_k, s.request.top_p) for s in rows]
    min_p = [0.0 if s.request.shaping is None else s.request.shaping.min_p for s in rows]
    return RowParams.build(wanted, vocab_size, device, never, min_p=min_p)


def sample_rows(rows: list[SampleSequence], logits: Tensor, params: RowParams) -> list[tuple[int, float]]:
    """A token and its logprob for each row, from ``logits`` (B, V).

    Logprobs are those of the distribution that is drawn from. Only where tokens are ruled out, by a grammar, min_tokens
    or a ban, they are the policy's own: those of the temperature alone. The likeliest tokens are added to those
    sequences whose request wants them; the sampled ones are not yet. Where nothing can be drawn, the logprob is NaN.
    """
    changed = [(i, s.request.shaping, s.seen) for i, s in enumerate(rows) if s.request.shaping is not None]
    moved = [each for each in changed if each[1].moves]
    logprobs, drawn_from = _distributions(rows, logits, shaped(logits, moved) if moved else logits, params)
    keys = np.array([s.key for s in rows], dtype=np.uint64)
    counters = np.array([len(s.tokens) for s in rows], dtype=np.uint64)
    ids = draw(drawn_from, params, uniforms(keys, counters))
    chosen = logprobs.gather(1, ids.unsqueeze(1))
    if drawn_from is not logprobs:
        chosen = chosen.where(drawn_from.gather(1, ids.unsqueeze(1)).isfinite(), float("nan"))
    _record_topk(rows, logprobs)
    return list(zip(ids.tolist(), chosen.squeeze(1).tolist(), strict=True))


def _distributions(rows: list[SampleSequence], logits: Tensor, z: Tensor, params: RowParams) -> tuple[Tensor, Tensor]:
    """Log-probabilities (B, V) that are reported, and those that are drawn from: the same where nothing is ruled out.

    ``z`` are the logits as their requests shape them.
    """
    logprobs = sampled_logprobs(z, params)
    some = [i for i, s in enumerate(rows) if s.request.masks]
    if not some:
        return logprobs, logprobs
    at = torch.tensor(some, device=z.device)
    of_some, vocab = [rows[i] for i in some], z.shape[1]
    allowed = torch.from_numpy(np.stack([_allowed(s, vocab) for s in of_some])).to(z.device)
    masked = z[at].float().masked_fill(~allowed, float("-inf"))
    drawn_from = sampled_logprobs(masked, row_params(of_some, vocab, z.device, params.never))
    free = RowParams.build([(s.request.temperature, -1, 1.0) for s in of_some], vocab, z.device)
    return (
        logprobs.index_copy(0, at, sampled_logprobs(logits[at], free)),
        logprobs.index_copy(0, at, drawn_from),
    )


def _allowed(sequence: SampleSequence, vocab_size: int) -> NDArray[np.bool_]:
    """The tokens (V,) that may come next. A form that can only end does so, whatever ``min_tokens`` says."""
    grammar, shaping, sampled = sequence.grammar, sequence.request.shaping, len(sequence.tokens)
    masks = [] if shaping is None else [shaping.allowed(sampled), shaping.late]
    if grammar is None:
        return masks[0] if masks[0] is not None else np.ones(vocab_size, dtype=bool)
    for mask in masks:
        if mask is None:
            return grammar.allowed
        if (both := grammar.allowed & mask).any():
            return both
    if masks:
        sequence.request.fail(DataError("logit_bias bans every token that the form of the reply allows next"))
    return grammar.allowed


def _record_topk(rows: list[SampleSequence], logprobs: Tensor) -> None:
    wanting = [i for i, s in enumerate(rows) if s.request.topk_sample]
    if not wanting:
        return
    most = max(rows[i].request.topk_sample for i in wanting)
    ids, values = top_columns(logprobs[torch.tensor(wanting, device=logprobs.device)], most)
    for i, row_ids, row_values in zip(wanting, ids, values, strict=True):
        k = rows[i].request.topk_sample
        rows[i].topk_ids.append(row_ids[:k])
        rows[i].topk_logprobs.append(row_values[:k])
