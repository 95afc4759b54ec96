"""What a request asks of the distribution at every prompt position beyond its own tokens: other ids, and draws."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tinker import types
from tinker.types.prompt_alt_tokens import PromptAltTokens
from torch import Tensor

from nat_plugin_evsys.engine.sampling.decoding import RowParams, draw, sampled_logprobs, stream_keys, uniforms
from nat_plugin_evsys.errors import DataError

MOST_CELLS = 2**24
"""Most logprobs that one request may ask for: prompt positions times ids, or times draws."""

UNWANTED = -1
"""An entry of the targets that nothing is computed for."""


class PromptScores:
    """Filled while the prompt is read; row i is about prompt position i + 1, which has a context.

    Logprobs are those of temperature 1, as all of a prompt's are; draws are made at the request's temperature, and are
    the same for the same seed.

    Args:
        length: tokens of the prompt, P.
        targets: ids to score, int64 (P - 1, K), dense or sparse, -1 where none is wanted; None asks for none.
        draws: tokens to draw at each position.
        temperature: 0 draws the likeliest token.
        seed: of the draws.
        never: ids that are not drawn.

    Raises:
        DataError: ``targets`` or ``draws`` is malformed.
    """

    def __init__(
        self,
        length: int,
        vocab_size: int,
        targets: types.TensorData | None,
        draws: int,
        temperature: float,
        seed: int,
        never: Sequence[int] = (),
    ) -> None:
        if isinstance(draws, bool) or not isinstance(draws, int) or draws < 0:
            raise DataError(f"prompt_alt_tokens_k must be an integer of at least 0, got {draws!r}")
        if length < 2:
            raise DataError("target_prompt_logprobs and prompt_alt_tokens_k need a prompt of two tokens or more")
        _check_cells("prompt_alt_tokens_k", length - 1, draws)
        self._given = targets
        self._targets = None if targets is None else _checked(targets, length - 1, vocab_size)
        self._scores = None if self._targets is None else np.zeros(self._targets.shape, dtype=np.float32)
        self._temperature = temperature
        self._never = never
        # Other streams than those of the samples, which have the seed itself.
        self._keys = stream_keys(seed ^ 0x5A5A5A5A, draws)
        self._ids = np.zeros((length - 1, draws), dtype=np.int64)
        self._logprobs = np.zeros((length - 1, draws), dtype=np.float32)

    def see(self, first: int, logprobs: Tensor) -> None:
        """Take ``logprobs`` (N, V) of prompt positions ``first``, ``first + 1``, …; ``first`` is at least 1."""
        rows = slice(first - 1, first - 1 + len(logprobs))
        if self._targets is not None and self._scores is not None:
            ids = self._targets[rows].to(logprobs.device)
            found = logprobs.gather(1, ids.clamp(min=0)).masked_fill(ids == UNWANTED, 0.0)
            self._scores[rows] = found.cpu().numpy()
        if not len(self._keys):
            return
        device, rows_like = logprobs.device, [(self._temperature, -1, 1.0)] * len(logprobs)
        never = torch.tensor(self._never, device=device) if self._never else None
        params = RowParams.build(rows_like, logprobs.shape[1], device, never)
        drawn_from = sampled_logprobs(logprobs, params)
        positions = np.arange(first, first + len(logprobs), dtype=np.uint64)
        for column, key in enumerate(self._keys):
            ids = draw(drawn_from, params, uniforms(np.full(len(logprobs), key), positions))
            self._ids[rows, column] = ids.cpu().numpy()
            self._logprobs[rows, column] = logprobs.gather(1, ids.unsqueeze(1)).squeeze(1).cpu().numpy()

    def fields(self) -> dict[str, Any]:
        """The fields of ``SampleResponse`` that were asked for, in the layout of the request."""
        found: dict[str, Any] = {}
        if self._given is not None and self._scores is not None:
            found["target_prompt_logprobs"] = _in_layout(self._scores, self._given)
        if len(self._keys):
            tensors = [types.TensorData.from_numpy(array) for array in (self._ids, self._logprobs)]
            found["prompt_alt_tokens"] = PromptAltTokens(*tensors)
        return found


def _checked(targets: types.TensorData, rows: int, vocab_size: int) -> Tensor:
    if not isinstance(targets, types.TensorData):
        raise DataError(f"target_prompt_logprobs is a {type(targets).__name__}; give types.TensorData of token ids")
    shape = list(targets.shape or ())
    if targets.dtype != "int64" or len(shape) != 2 or shape[0] != rows or shape[1] < 1:
        raise DataError(
            f"target_prompt_logprobs must be int64 of shape [{rows}, K], one row for each token but the first, got "
            f"{targets.dtype} {shape}"
        )
    _check_cells("target_prompt_logprobs", rows, shape[1])
    try:
        ids = targets.to_torch(pad_value=UNWANTED)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise DataError(f"target_prompt_logprobs is malformed: {error}") from error
    if bool(((ids < UNWANTED) | (ids >= vocab_size)).any()):
        raise DataError(f"target_prompt_logprobs has an id outside 0 to {vocab_size - 1}; -1 is for none")
    if not bool((ids != UNWANTED).any()):
        raise DataError("target_prompt_logprobs names no id; leave it out")
    return ids


def _check_cells(name: str, rows: int, columns: int) -> None:
    if rows * columns > MOST_CELLS:
        raise DataError(f"{name} asks for {rows} times {columns} logprobs; at most {MOST_CELLS} are given at once")


def _in_layout(scores: np.ndarray, given: types.TensorData) -> types.TensorData:
    if given.sparse_crow_indices is None or given.sparse_col_indices is None:
        return types.TensorData.from_numpy(scores)
    counts = torch.tensor(given.sparse_crow_indices).diff()
    rows = torch.arange(len(scores)).repeat_interleave(counts)
    return types.TensorData(
        data=scores[rows.numpy(), np.array(given.sparse_col_indices)].tolist(),
        dtype="float32",
        shape=given.shape,
        sparse_crow_indices=given.sparse_crow_indices,
        sparse_col_indices=given.sparse_col_indices,
    )
