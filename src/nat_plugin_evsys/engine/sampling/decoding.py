"""From logits to sampled tokens, vectorised over rows.

The sampled distribution of a row is built in this order, and logprobs are those of the result:

0. what ``shaping`` changes of the logits, if anything;
1. temperature: ``z = logits / T`` (fp32);
2. min_p: keep the tokens with at least min_p times the probability of the likeliest; top_k: of these, the k largest z
   (ties at the border: the lower token ids);
3. top_p: over what they left, renormalised, in falling order, keep each token whose predecessors sum to less than
   top_p; that is the smallest set that reaches top_p, and always at least one token;
4. ``log p = log_softmax`` over the kept tokens.

Token ids that the tokenizer does not have are never drawn. Their probability stays in the logprobs, which are those of
the policy as training computes them; of rows with min_p, top_k or top_p it is left out in step 2.

Temperature 0 is greedy: the argmax (ties: the lowest id); min_p, top_k and top_p play no part, and the logprob reported
is that of temperature 1, since the greedy distribution itself is a point mass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_SEED_MASK = (1 << 64) - 1
_BLOCK = 256
_BELOW_ONE = 1.0 - 2.0**-52


def _mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's output function (Steele, Lea, Flood 2014), elementwise on uint64."""
    state = (state ^ (state >> np.uint64(30))) * _MIX_1
    state = (state ^ (state >> np.uint64(27))) * _MIX_2
    return state ^ (state >> np.uint64(31))


def stream_keys(seed: int, num_samples: int) -> np.ndarray:
    """One uint64 key a sample, shape (num_samples,); a key depends on ``seed`` and the sample's index only."""
    root = _mix(np.array([seed & _SEED_MASK], dtype=np.uint64))
    return _mix(root ^ _mix(np.arange(1, num_samples + 1, dtype=np.uint64) * _GOLDEN))


def uniforms(keys: np.ndarray, counters: np.ndarray) -> np.ndarray:
    """Counter-based uniform numbers in [0, 1): float64 (B,) for uint64 ``keys`` and ``counters``, both (B,).

    Nothing is carried from one draw to the next, so a sequence's numbers do not depend on what else is in the batch.
    """
    bits = _mix(keys + (counters + np.uint64(1)) * _GOLDEN)
    # 52 bits: u * total stays below total in float64, so the inverse CDF never runs off its end.
    return (bits >> np.uint64(12)).astype(np.float64) * 2.0**-52


@dataclass(frozen=True)
class RowParams:
    """Sampling parameters of B rows as tensors on the logits' device.

    Attributes:
        temperature: (B, 1) fp32; 1 for greedy rows.
        greedy: (B,) bool.
        top_k: (B,) int64, the vocabulary's size when off.
        top_p: (B,) float64, infinity when off.
        floor: (B,) fp32, the logarithm of min_p, -infinity when off.
        filtered: indices of the rows with min_p, top_k or top_p on, or None if there are none.
        unit_temperature, any_greedy, all_greedy: what a step may skip.
        never: (N,) int64 token ids that are not drawn, or None if there are none.
    """

    temperature: Tensor
    greedy: Tensor
    top_k: Tensor
    top_p: Tensor
    floor: Tensor
    filtered: Tensor | None
    unit_temperature: bool
    any_greedy: bool
    all_greedy: bool
    never: Tensor | None = None

    @classmethod
    def build(
        cls,
        rows: list[tuple[float, int, float]],
        vocab_size: int,
        device: torch.device,
        never: Tensor | None = None,
        *,
        min_p: Sequence[float] = (),
    ) -> RowParams:
        """From one ``(temperature, top_k, top_p)`` a row, with Tinker's values for "off" (top_k <= 0, top_p >= 1).

        ``min_p`` has one number a row, 0 is off; or none at all.
        """
        greedy = [t == 0 for t, _, _ in rows]
        top_k = [vocab_size if g or k <= 0 else min(k, vocab_size) for g, (_, k, _) in zip(greedy, rows, strict=True)]
        top_p = [float("inf") if g or p >= 1 else p for g, (_, _, p) in zip(greedy, rows, strict=True)]
        floor = [math.log(p) if p > 0 and not g else -math.inf for g, p in zip(greedy, min_p, strict=False)]
        floor = floor or [-math.inf] * len(rows)
        on = [i for i in range(len(rows)) if top_k[i] < vocab_size or top_p[i] < 1 or floor[i] > -math.inf]
        temperature = [1.0 if g else t for g, (t, _, _) in zip(greedy, rows, strict=True)]
        return cls(
            temperature=torch.tensor(temperature, dtype=torch.float32, device=device).unsqueeze(1),
            greedy=torch.tensor(greedy, device=device),
            top_k=torch.tensor(top_k, device=device),
            top_p=torch.tensor(top_p, dtype=torch.float64, device=device),
            floor=torch.tensor(floor, dtype=torch.float32, device=device),
            filtered=torch.tensor(on, device=device) if on else None,
            unit_temperature=all(t == 1.0 for t in temperature),
            any_greedy=any(greedy),
            all_greedy=all(greedy),
            never=never,
        )


def _running_sums(x: Tensor) -> Tensor:
    """``x.cumsum(dim=-1)``, on the CPU where a GPU would refuse it: no kernel of its sums floats in a fixed order
    (docstring of ``torch.use_deterministic_algorithms``)."""
    if x.device.type == "cuda" and torch.are_deterministic_algorithms_enabled():
        return x.cpu().cumsum(dim=-1).to(x.device)
    return x.cumsum(dim=-1)


def restrict(z: Tensor, top_k: Tensor, top_p: Tensor, floor: Tensor) -> Tensor:
    """``z`` (R, V) with -inf where min_p, top_k and then top_p drop a token, (R,) each; see the module's docstring."""
    values, order = z.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(z.shape[-1], device=z.device)
    too_small = (rank >= top_k.unsqueeze(1)) | (values < values[:, :1] + floor.unsqueeze(1))
    values = values.masked_fill(too_small, float("-inf"))
    probs = values.double().softmax(dim=-1)
    before = _running_sums(probs) - probs
    drop = (before >= top_p.unsqueeze(1)) & (rank > 0)
    return torch.empty_like(z).scatter_(-1, order, values.masked_fill(drop, float("-inf")))


def sampled_logprobs(logits: Tensor, params: RowParams) -> Tensor:
    """Log-probabilities (B, V), fp32, of the distribution that each row is sampled from (greedy rows: T = 1)."""
    z = logits.float()
    if not params.unit_temperature:
        z = z / params.temperature
    if params.filtered is not None:
        z = z.index_copy(0, params.filtered, restrict(*_of(params, z, params.filtered)))
    return z.log_softmax(dim=-1)


def _of(params: RowParams, z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _without(z[rows], params.never), params.top_k[rows], params.top_p[rows], params.floor[rows]


def _without(z: Tensor, never: Tensor | None) -> Tensor:
    return z if never is None else z.index_fill(-1, never, float("-inf"))


def likeliest(z: Tensor, never: Tensor | None) -> Tensor:
    """The id (B,) with the largest of ``z`` (B, V) in each row; ties: the lowest id."""
    ids = z.argmax(dim=-1)
    if never is None or not torch.isin(ids, never).any():
        return ids
    return _without(z, never).argmax(dim=-1)


def draw(logprobs: Tensor, params: RowParams, u: np.ndarray) -> Tensor:
    """Token ids (B,) by inverse CDF from ``logprobs`` (B, V) and uniform numbers ``u`` (B,); argmax in greedy rows.

    The CDF is summed in two steps, of blocks of tokens and within the block that ``u`` falls into, both in float64: in
    fp32 the tail of a large vocabulary would never be drawn.
    """
    if params.all_greedy:
        return likeliest(logprobs, params.never)
    rows, vocab = logprobs.shape
    probs = logprobs.new_empty(rows, -(-vocab // _BLOCK), _BLOCK)
    torch.exp(logprobs, out=probs.view(rows, -1)[:, :vocab])
    probs.view(rows, -1)[:, vocab:] = 0.0
    if params.never is not None:
        probs.view(rows, -1).index_fill_(1, params.never, 0.0)
    ends = _running_sums(probs.sum(dim=-1).double())
    goal = torch.from_numpy(u).to(ends.device).unsqueeze(1) * ends[:, -1:]
    block = torch.searchsorted(ends, goal, right=True).clamp_(max=ends.shape[1] - 1)
    start = torch.where(block > 0, ends.gather(1, (block - 1).clamp_(min=0)), 0.0)
    share = (goal - start) / (ends.gather(1, block) - start)
    inner = _running_sums(probs[torch.arange(rows, device=block.device), block[:, 0]].double())
    at = torch.searchsorted(inner, share.clamp_(0.0, _BELOW_ONE) * inner[:, -1:], right=True)
    tokens = (block * _BLOCK + at).squeeze(1).clamp_(max=vocab - 1)
    return torch.where(params.greedy, likeliest(logprobs, params.never), tokens) if params.any_greedy else tokens
