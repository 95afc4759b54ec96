"""What sampled tokens are compared with, where two computations of one probability differ in their last bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from tinker.types import SamplingParams

from nat_plugin_evsys.engine.sampling.decoding import RowParams, sampled_logprobs, stream_keys, uniforms

ROUNDING = 1e-5
"""How far two computations of one probability, logit or log-probability may lie from each other."""

LogitsOf = Callable[[list[int]], torch.Tensor]
"""``(T, V)`` of a plain forward pass over T token ids."""


def assert_same_samples(
    one: Sequence[Any],
    other: Sequence[Any],
    prompt: Sequence[int],
    params: SamplingParams,
    logits_of: LogitsOf | None = None,
) -> None:
    """One request computed in two ways gives the same tokens, logprobs and ends.

    Two samples may part only where the last bit of a sum decides: where the uniform number lies on the border between
    both tokens, or where greedy sampling finds two equal maxima. What comes after that cannot be compared.

    Args:
        one, other: the sequences of each computation.
        params: of both; with a seed or greedy, without top_k and top_p.
        logits_of: default: the samples carry the logprobs of the whole vocabulary.
    """
    for index, (a, b) in enumerate(zip(one, other, strict=True)):
        same = next((i for i, (x, y) in enumerate(zip(a.tokens, b.tokens, strict=False)) if x != y), None)
        if same is None:
            assert (a.tokens, a.stop_reason) == (b.tokens, b.stop_reason)
        else:
            logits = _told(a, same) if logits_of is None else logits_of([*prompt, *a.tokens[:same]])[-1]
            distance = _from_border(logits, params, index, same, a.tokens[same], b.tokens[same])
            assert distance <= ROUNDING, f"sample {index} parts at token {same}, {distance:g} from the border"
        np.testing.assert_allclose(a.logprobs[:same], b.logprobs[:same], rtol=0, atol=ROUNDING)


def _told(sequence: Any, position: int) -> torch.Tensor:
    """``(V,)``: the logprobs that a sample carries, of temperature 1, in the order of the tokens."""
    values = dict(sequence.topk_logprobs[position])
    return torch.tensor([values[token] for token in range(len(values))])


def _from_border(logits: torch.Tensor, params: SamplingParams, index: int, position: int, a: int, b: int) -> float:
    """How far this draw is from being undecided between two tokens: in probability; greedy: in logits."""
    if params.temperature == 0:
        return float(logits.max() - logits[[a, b]].min())
    rows = RowParams.build([(params.temperature, -1, 1.0)], len(logits), logits.device)
    ends = sampled_logprobs(logits[None], rows)[0].double().exp().cumsum(0)
    assert params.seed is not None
    key = stream_keys(params.seed, index + 1)[index:]
    u = float(uniforms(key, np.array([position], dtype=np.uint64))[0])
    low, high = sorted((a, b))
    # It lies where both meet, and what lies between them is as good as impossible.
    return max(abs(float(ends[low]) - u), abs(float(ends[high - 1]) - u))


def assert_greedy(tokens: Sequence[int], logits: torch.Tensor) -> None:
    """Each token has the largest logit of its row of ``logits (T, V)``, or one that equals it to rounding."""
    chosen = logits[range(len(tokens)), list(tokens)]
    assert float((logits.max(dim=-1).values - chosen).max()) <= ROUNDING


def assert_likeliest(entries: Sequence[tuple[int, float]], logprobs: torch.Tensor) -> None:
    """``(token, logprob)`` of the likeliest tokens in falling order; those that are equal to rounding in any order.

    Args:
        logprobs: ``(V,)``, computed in another way.
    """
    tokens, found = [token for token, _ in entries], torch.tensor([value for _, value in entries])
    assert len(set(tokens)) == len(tokens)
    assert (found.diff() <= 0).all()
    torch.testing.assert_close(found, logprobs[tokens].to(found.dtype), rtol=0, atol=ROUNDING)
    others = logprobs.clone()
    others[tokens] = float("-inf")
    assert float(others.max()) <= float(found[-1]) + ROUNDING
