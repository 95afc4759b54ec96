"""One token for each of some sequences, from their logits."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from nat_plugin_evsys.engine.sampling.decoding import RowParams, draw, penalised, sampled_logprobs, uniforms
from nat_plugin_evsys.engine.sampling.request import SampleSequence
from nat_plugin_evsys.engine.sampling.result import top_columns


def row_params(
    rows: list[SampleSequence], vocab_size: int, device: torch.device, never: Tensor | None = None
) -> RowParams:
    """The sampling parameters of each row."""
    wanted = [(s.request.temperature, s.request.top_k, s.request.top_p) for s in rows]
    return RowParams.build(wanted, vocab_size, device, never)


def sample_rows(rows: list[SampleSequence], logits: Tensor, params: RowParams) -> list[tuple[int, float]]:
    """A token and its logprob for each row, from ``logits`` (B, V).

    A row with a grammar is drawn from what the grammar allows, but its logprobs are the policy's own: those of the
    distribution without the grammar, top_k and top_p. The likeliest tokens are added to those sequences whose request
    wants them; the sampled ones are not yet.
    """
    penalties = [
        (i, [*s.request.prompt, *s.tokens], s.request.repetition_penalty)
        for i, s in enumerate(rows)
        if s.request.repetition_penalty != 1.0
    ]
    if penalties:
        logits = penalised(logits, penalties)
    logprobs, drawn_from = _distributions(rows, logits, params)
    keys = np.array([s.key for s in rows], dtype=np.uint64)
    counters = np.array([len(s.tokens) for s in rows], dtype=np.uint64)
    ids = draw(drawn_from, params, uniforms(keys, counters))
    chosen = logprobs.gather(1, ids.unsqueeze(1)).squeeze(1).tolist()
    _record_topk(rows, logprobs)
    return list(zip(ids.tolist(), chosen, strict=True))


def _distributions(rows: list[SampleSequence], logits: Tensor, params: RowParams) -> tuple[Tensor, Tensor]:
    """Log-probabilities (B, V) that are reported, and those that are drawn from: the same without a grammar."""
    logprobs = sampled_logprobs(logits, params)
    some = [i for i, s in enumerate(rows) if s.grammar is not None]
    if not some:
        return logprobs, logprobs
    at = torch.tensor(some, device=logits.device)
    allowed = np.stack([grammar.allowed for s in rows if (grammar := s.grammar) is not None])
    z, of_some, (_, vocab) = logits[at].float(), [rows[i] for i in some], logits.shape
    free = RowParams.build([(s.request.temperature, -1, 1.0) for s in of_some], vocab, logits.device)
    masked = z.masked_fill(~torch.from_numpy(allowed).to(logits.device), float("-inf"))
    drawn_from = sampled_logprobs(masked, row_params(of_some, vocab, logits.device))
    return logprobs.index_copy(0, at, sampled_logprobs(z, free)), logprobs.index_copy(0, at, drawn_from)


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
