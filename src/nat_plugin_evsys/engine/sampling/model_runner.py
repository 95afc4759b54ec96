"""Forward passes for sampling: prefill, decode one token, score a prompt."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from tinker.types.topk_logprobs import MASK_LOGPROB
from torch import Tensor

from nat_plugin_evsys.engine.model.loading import BaseModel
from nat_plugin_evsys.engine.model.long_rope import long_rope_limit, sequence_lengths
from nat_plugin_evsys.engine.model.lora import LoraAdapter, applied
from nat_plugin_evsys.engine.sampling.kv_cache import AttentionMasks, KVLayout, SlotCache, SlotStore
from nat_plugin_evsys.engine.sampling.prompt_scores import PromptScores
from nat_plugin_evsys.engine.sampling.result import top_columns

Score = tuple[np.ndarray, np.ndarray | None, np.ndarray | None]
"""Of one prompt: logprobs float32 (P,), NaN at 0; top-k ids int32 and logprobs float32, (P, k) each, or None."""

_MOST_LOGITS = 1 << 25


class ModelRunner:
    """Runs a base model with an adapter over slots of a ``SlotStore``.

    Args:
        base: the frozen base model.
        prefill_tokens: most tokens (rows times width) in one forward pass; longer prompts are fed in pieces.

    Attributes:
        rope_limit: tokens from which on a sequence has another rotary table, so that all it keeps is computed again.

    Raises:
        ModelError: the sampler cannot decode this architecture.
    """

    def __init__(self, base: BaseModel, prefill_tokens: int = 4096) -> None:
        self.vocab_size = base.vocab_size
        self.device = base.device
        self.prefill_tokens = prefill_tokens
        self.fed_tokens = 0
        self._model = base.model
        with torch.inference_mode(), applied(None):
            self.layout = KVLayout.probe(base.model, base.device)
        self.rope_limit = long_rope_limit(base.model)
        self._masks = AttentionMasks(base.model.config.get_text_config(), base.dtype)

    def decode(self, adapter: LoraAdapter | None, store: SlotStore, tokens: list[int], positions: list[int]) -> Tensor:
        """Feed one token per row into slots 0, 1, ...: logits (B, V) of the next one."""
        length = max(positions) + 1
        store.reserve(len(tokens), length)
        at = torch.tensor(positions, device=self.device).unsqueeze(1)
        ids = torch.tensor(tokens, device=self.device).unsqueeze(1)
        cache = SlotCache(store, 0, len(tokens), at, None, length)
        self.fed_tokens += len(tokens)
        return self._forward(adapter, ids, at, cache, length, keep=1)[:, -1]

    def prefill(
        self,
        adapter: LoraAdapter | None,
        store: SlotStore,
        first: int,
        contexts: list[list[int]],
        starts: list[int],
    ) -> Tensor:
        """Feed ``contexts[i][starts[i]:]`` into slot ``first + i``, which holds what comes before.

        Returns the logits (len(contexts), V) after each context's last token.
        """
        logits = []
        for low, high in self._batches([len(c) - s for c, s in zip(contexts, starts, strict=True)]):
            feed = _Feed.build(contexts[low:high], starts[low:high], self.device)
            piece = max(1, self.prefill_tokens // feed.rows)
            for begin in range(0, feed.width, piece):
                out = self._feed(adapter, store, first + low, feed, begin, begin + piece, keep=1)
            logits.append(out[:, -1])
        return torch.cat(logits)

    def score(
        self,
        adapter: LoraAdapter | None,
        store: SlotStore,
        prompts: list[list[int]],
        topk: int,
        watchers: Sequence[PromptScores | None] = (),
    ) -> list[Score]:
        """Prompt logprobs at temperature 1, computed from the whole prompts in slots 0, 1, ...

        Only a bounded piece of the ``(rows, width, V)`` logits is in memory at a time. ``watchers``, one a prompt or
        none, see all of them.
        """
        feed = _Feed.build(prompts, [0] * len(prompts), self.device)
        logprobs = np.full((feed.rows, feed.width), np.nan, dtype=np.float32)
        ids = np.zeros((feed.rows, feed.width, topk), dtype=np.int32)
        values = np.zeros((feed.rows, feed.width, topk), dtype=np.float32)
        piece = max(1, min(self.prefill_tokens // feed.rows, _MOST_LOGITS // (feed.rows * self.vocab_size)))
        for begin in range(0, feed.width, piece):
            out = self._feed(adapter, store, 0, feed, begin, begin + piece, keep=0).float().log_softmax(dim=-1)
            # Column c predicts the token in column c + 1; the last column predicts nothing that is known.
            known = min(begin + piece, feed.width - 1) - begin
            if known <= 0:
                continue
            target = feed.ids[:, begin + 1 : begin + 1 + known].unsqueeze(-1)
            here = slice(begin + 1, begin + 1 + known)
            logprobs[:, here] = out[:, :known].gather(-1, target).squeeze(-1).cpu().numpy()
            if topk:
                flat_ids, flat_values = top_columns(out[:, :known].flatten(0, 1), topk)
                ids[:, here] = flat_ids.reshape(feed.rows, known, topk)
                values[:, here] = flat_values.reshape(feed.rows, known, topk)
            for row, (prompt, watcher) in enumerate(zip(prompts, watchers, strict=False)):
                # The row begins with padding; its first token has no context.
                first = begin + 1 - (feed.width - len(prompt))
                skipped = max(0, 1 - first)
                if watcher is not None and skipped < known:
                    watcher.see(first + skipped, out[row, skipped:known])
        return [_cut(logprobs[r], ids[r], values[r], len(p), topk) for r, p in enumerate(prompts)]

    def _batches(self, widths: Sequence[int]) -> list[tuple[int, int]]:
        """Consecutive [low, high) whose padded size stays within ``prefill_tokens`` (or that are single rows)."""
        batches: list[tuple[int, int]] = []
        low, widest = 0, 0
        for i, width in enumerate(widths):
            if i > low and max(widest, width) * (i + 1 - low) > self.prefill_tokens:
                batches.append((low, i))
                low, widest = i, 0
            widest = max(widest, width)
        return [*batches, (low, len(widths))]

    def _feed(
        self,
        adapter: LoraAdapter | None,
        store: SlotStore,
        first: int,
        feed: _Feed,
        begin: int,
        end: int,
        keep: int,
    ) -> Tensor:
        positions, valid = feed.positions[:, begin:end], feed.valid[:, begin:end]
        length = feed.length_at(end)
        store.reserve(first + feed.rows, length)
        cache = SlotCache(store, first, feed.rows, positions, valid, length)
        self.fed_tokens += int(feed.counts[:, begin:end].sum())
        with sequence_lengths(feed.lengths):
            return self._forward(adapter, feed.ids[:, begin:end], positions, cache, length, keep)

    def _forward(
        self, adapter: LoraAdapter | None, ids: Tensor, positions: Tensor, cache: SlotCache, length: int, keep: int
    ) -> Tensor:
        """Logits (rows, keep or T, V); ``keep`` last positions, all if 0."""
        with applied(adapter):
            output = self._model(
                input_ids=ids,
                attention_mask=self._masks.build(positions, length),
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=keep,
            )
        logits: Tensor = output.logits
        return logits


class _Feed:
    """Ragged token lists padded on the left, so that every row's last token is in the last column.

    Attributes:
        ids, positions: (rows, width) int64 on the device; padding has id 0 and position 0.
        valid: (rows, width) bool on the device. counts: the same as numpy.
        lengths: (rows,) tokens of each context, those before the fed ones included.
    """

    def __init__(self, ids: np.ndarray, positions: np.ndarray, counts: np.ndarray, device: torch.device) -> None:
        self.rows, self.width = ids.shape
        self.counts = counts
        self._positions = positions
        self.lengths = torch.from_numpy(positions[:, -1] + 1)
        self.ids, self.positions, self.valid = (torch.from_numpy(a).to(device) for a in (ids, positions, counts))

    @classmethod
    def build(cls, contexts: list[list[int]], starts: list[int], device: torch.device) -> _Feed:
        """Of ``contexts[i][starts[i]:]``."""
        width = max(len(c) - s for c, s in zip(contexts, starts, strict=True))
        ids = np.zeros((len(contexts), width), dtype=np.int64)
        positions = np.zeros_like(ids)
        counts = np.zeros(ids.shape, dtype=bool)
        for r, (context, start) in enumerate(zip(contexts, starts, strict=True)):
            at = width - (len(context) - start)
            ids[r, at:] = context[start:]
            positions[r, at:] = np.arange(start, len(context))
            counts[r, at:] = True
        return cls(ids, positions, counts, device)

    def length_at(self, end: int) -> int:
        """Columns of the store that are in use once columns [0, end) of this feed are."""
        return int(self._positions[:, min(end, self.width) - 1].max()) + 1


def _cut(logprobs: np.ndarray, ids: np.ndarray, values: np.ndarray, length: int, topk: int) -> Score:
    """One row without its padding, with nothing at the first token."""
    at = logprobs.shape[0] - length
    own = logprobs[at:].copy()
    own[0] = np.nan
    if not topk:
        return own, None, None
    own_ids, own_values = ids[at:].copy(), values[at:].copy()
    own_ids[0], own_values[0] = 0, MASK_LOGPROB
    return own, own_ids, own_values
