"""One sequence at a time, exact and slower: for models that keep something other than keys and values in each layer."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tinker.types.topk_logprobs import MASK_LOGPROB
from torch import Tensor

from nat_plugin_evsys.engine.model.loading import BaseModel
from nat_plugin_evsys.engine.model.long_rope import long_rope_limit
from nat_plugin_evsys.engine.model.lora import LoraAdapter, applied
from nat_plugin_evsys.engine.sampling.kv_cache import KVLayout, SlotStore
from nat_plugin_evsys.engine.sampling.model_runner import Score
from nat_plugin_evsys.engine.sampling.prompt_scores import PromptScores
from nat_plugin_evsys.engine.sampling.result import top_columns
from nat_plugin_evsys.engine.sampling.row_decoder import Context

_CACHES = ("past_key_values", "cache_params")
"""What transformers calls the cache of a model, in its outputs and its arguments."""


class ExactRunner:
    """Runs a base model over single sequences.

    Args:
        base: the frozen base model.
        cached: go on from transformers' own cache; if not, every token computes its whole sequence again.
    """

    def __init__(self, base: BaseModel, *, cached: bool) -> None:
        self.vocab_size = base.vocab_size
        self.device = base.device
        self.prefill_tokens = 4096
        self.fed_tokens = 0
        self.layout = KVLayout.nothing(base.dtype, base.device)
        self._model: Any = base.model
        self._cached = cached
        self._rope_limit = long_rope_limit(base.model)

    def read(self, adapter: LoraAdapter | None, tokens: list[int]) -> tuple[Tensor, Any]:
        """Logits [V] after the last of ``tokens``, and the cache from which ``go_on`` continues, or None."""
        logits, cache = self._pass(adapter, tokens, {}, use_cache=self._cached)
        return logits[-1], cache

    def go_on(self, adapter: LoraAdapter | None, cache: Any, tokens: list[int]) -> tuple[Tensor, Any]:
        """``read`` where ``cache`` has all tokens but the last; it is changed."""
        crosses = self._rope_limit is not None and len(tokens) == self._rope_limit + 1
        if cache is None or crosses:
            return self.read(adapter, tokens)
        name, state = cache
        logits, cache = self._pass(adapter, tokens[-1:], {name: state}, use_cache=True)
        return logits[-1], cache

    def score(
        self,
        adapter: LoraAdapter | None,
        store: SlotStore,
        prompts: list[list[int]],
        topk: int,
        watchers: Sequence[PromptScores | None] = (),
    ) -> list[Score]:
        """See ``ModelRunner.score``; ``store`` stays as it is."""
        seen = [*watchers, *[None] * (len(prompts) - len(watchers))]
        return [self._score(adapter, p, topk, w) for p, w in zip(prompts, seen, strict=True)]

    def _score(self, adapter: LoraAdapter | None, prompt: list[int], topk: int, watcher: PromptScores | None) -> Score:
        logits, _ = self._pass(adapter, prompt, {}, use_cache=False)
        known = logits[:-1].float().log_softmax(dim=-1)
        logprobs = np.full(len(prompt), np.nan, dtype=np.float32)
        targets = torch.tensor(prompt[1:], dtype=torch.long, device=self.device)
        logprobs[1:] = known.gather(-1, targets[:, None]).squeeze(-1).cpu().numpy()
        if watcher is not None and len(prompt) > 1:
            watcher.see(1, known)
        if not topk:
            return logprobs, None, None
        ids = np.zeros((len(prompt), topk), dtype=np.int32)
        values = np.full((len(prompt), topk), MASK_LOGPROB, dtype=np.float32)
        if len(prompt) > 1:
            ids[1:], values[1:] = top_columns(known, topk)
        return logprobs, ids, values

    def _pass(
        self, adapter: LoraAdapter | None, tokens: list[int], cache: dict[str, Any], *, use_cache: bool
    ) -> tuple[Tensor, Any]:
        """Logits [T, V], and ``(argument name, cache)`` if the model returned one."""
        self.fed_tokens += len(tokens)
        ids = torch.tensor([tokens], device=self.device)
        with applied(adapter):
            out = self._model(input_ids=ids, use_cache=use_cache, **cache)
        found = [(name, out[name]) for name in _CACHES if use_cache and out.get(name) is not None]
        return out.logits[0], found[0] if found else None


class ExactDecoder:
    """The ``RowDecoder`` of an ``ExactRunner``: each row with a cache of its own."""

    def __init__(self, runner: ExactRunner, adapter: LoraAdapter | None) -> None:
        self.store = SlotStore(runner.layout)
        self._runner = runner
        self._adapter = adapter
        self._rows: list[tuple[list[int], Any]] = []
        self._waiting: list[Context] = []

    def join(self, context: Context) -> None:
        """See ``RowDecoder``."""
        self._waiting.append(context)

    def leave(self, context: Context) -> None:
        """See ``RowDecoder``."""
        self._waiting.remove(context)

    def step(self, tokens: Sequence[int]) -> tuple[Tensor, list[Context]]:
        """See ``RowDecoder``."""
        logits = []
        for row, token in enumerate(tokens):
            whole, cache = self._rows[row]
            whole.append(token)
            found, cache = self._runner.go_on(self._adapter, cache, whole)
            self._rows[row] = (whole, cache)
            logits.append(found)
        read, self._waiting = self._waiting, []
        for context in read:
            found, cache = self._runner.read(self._adapter, context.tokens)
            self._rows += [(list(context.tokens), copy.deepcopy(cache)) for _ in range(context.rows)]
            logits.append(found)
        return torch.stack(logits), read

    def remove(self, row: int, tokens: list[int] | None) -> None:
        """See ``RowDecoder``; nothing is kept."""
        last = self._rows.pop()
        if row < len(self._rows):
            self._rows[row] = last

    def keep(self, tokens: list[int], store: SlotStore, slot: int) -> None:
        """See ``RowDecoder``; nothing is kept."""

    def fits(self, contexts: Sequence[Context]) -> bool:
        """See ``RowDecoder``. What a row's cache will take is not known, so only the number of rows is bounded."""
        return True

    def close(self) -> None:
        """See ``RowDecoder``."""
        self._rows.clear()
        self._waiting.clear()
