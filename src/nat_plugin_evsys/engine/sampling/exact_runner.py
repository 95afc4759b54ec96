"""One sequence at a time, exact and slower: for models that keep something other than keys and values in each layer,
and for prompts with images."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tinker.types.topk_logprobs import MASK_LOGPROB
from torch import Tensor

from nat_plugin_evsys.engine.model.images import PlacedImage
from nat_plugin_evsys.engine.model.loading import BaseModel
from nat_plugin_evsys.engine.model.long_rope import long_rope_limit
from nat_plugin_evsys.engine.model.lora import LoraAdapter, applied
from nat_plugin_evsys.engine.model.vision import Vision
from nat_plugin_evsys.engine.sampling.budgets import KVBudget
from nat_plugin_evsys.engine.sampling.exact_prefixes import ExactPrefixes
from nat_plugin_evsys.engine.sampling.kv_cache import KVLayout, SlotStore
from nat_plugin_evsys.engine.sampling.model_runner import Score
from nat_plugin_evsys.engine.sampling.prompt_scores import PromptScores
from nat_plugin_evsys.engine.sampling.result import top_columns
from nat_plugin_evsys.engine.sampling.row_decoder import Context

Images = Sequence[PlacedImage]

_CACHES = ("past_key_values", "cache_params")
"""What transformers calls the cache of a model, in its outputs and its arguments."""


class ExactRunner:
    """Runs a base model over single sequences.

    Args:
        base: the frozen base model.
        cached: go on from transformers' own cache; if not, every token computes its whole sequence again.
        extends: go on with several tokens at once, too.
    """

    def __init__(self, base: BaseModel, *, cached: bool, extends: bool = False) -> None:
        self.extends = extends
        self.vocab_size = base.vocab_size
        self.device = base.device
        self.prefill_tokens = 4096
        self.fed_tokens = 0
        self.layout = KVLayout.nothing(base.dtype, base.device)
        self._model: Any = base.model
        self._vision = base.vision
        self._cached = cached
        self._rope_limit = long_rope_limit(base.model)

    def read(self, adapter: LoraAdapter | None, tokens: list[int], images: Images = ()) -> tuple[Tensor, Any]:
        """Logits [V] after the last of ``tokens``, and the cache from which ``go_on`` continues, or None."""
        logits, cache = self._pass(adapter, self._whole(tokens, images), use_cache=self._cached)
        return logits[-1], cache

    def go_on(
        self, adapter: LoraAdapter | None, cache: Any, tokens: list[int], images: Images = (), *, new: int = 1
    ) -> tuple[Tensor, Any]:
        """``read`` where ``cache`` has all tokens but the last ``new`` ones, which are text; it is changed."""
        known = len(tokens) - new
        crosses = self._rope_limit is not None and known <= self._rope_limit < len(tokens)
        if cache is None or crosses:
            return self.read(adapter, tokens, images)
        name, state = cache
        inputs = {"input_ids": torch.tensor([tokens[known:]], device=self.device), name: state}
        if images and isinstance(self._vision, Vision):
            inputs |= self._vision.going_on(known, new, images)
        logits, cache = self._pass(adapter, inputs, use_cache=True)
        return logits[-1], cache

    def score(
        self,
        adapter: LoraAdapter | None,
        store: SlotStore,
        prompts: list[list[int]],
        topk: int,
        watchers: Sequence[PromptScores | None] = (),
        images: Sequence[Images] = (),
    ) -> list[Score]:
        """See ``ModelRunner.score``; ``store`` stays as it is. ``images``: those of each prompt."""
        seen = [*watchers, *[None] * (len(prompts) - len(watchers))]
        of_each = zip(prompts, images or [()] * len(prompts), seen, strict=True)
        return [self._score(adapter, prompt, shown, topk, watcher) for prompt, shown, watcher in of_each]

    def _score(
        self, adapter: LoraAdapter | None, prompt: list[int], images: Images, topk: int, watcher: PromptScores | None
    ) -> Score:
        logits, _ = self._pass(adapter, self._whole(prompt, images), use_cache=False)
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

    def _whole(self, tokens: list[int], images: Images) -> dict[str, Any]:
        """Arguments of the model for a whole sequence."""
        if images and isinstance(self._vision, Vision):
            return self._vision.inputs(torch.tensor(tokens), images)
        return {"input_ids": torch.tensor([tokens], device=self.device)}

    def _pass(self, adapter: LoraAdapter | None, inputs: dict[str, Any], *, use_cache: bool) -> tuple[Tensor, Any]:
        """Logits [T, V], and ``(argument name, cache)`` if the model returned one."""
        self.fed_tokens += inputs["input_ids"].numel()
        with applied(adapter):
            out = self._model(**inputs, use_cache=use_cache)
        found = [(name, out[name]) for name in _CACHES if use_cache and out.get(name) is not None]
        return out.logits[0], found[0] if found else None


class ExactDecoder:
    """The ``RowDecoder`` of an ``ExactRunner``: each row with a cache of its own.

    Args:
        kv: memory for all rows; None where it is not known what a token's state takes.
        bytes_per_token: what it takes.
        prefixes: what is kept of sequences that were read, and under which number for this policy; None keeps nothing.
    """

    def __init__(
        self,
        runner: ExactRunner,
        adapter: LoraAdapter | None,
        prefixes: tuple[ExactPrefixes, int] | None = None,
        *,
        kv: KVBudget | None = None,
        bytes_per_token: int = 0,
    ) -> None:
        self.store = SlotStore(runner.layout)
        kept, self._policy = prefixes or (None, -1)
        self._prefixes: ExactPrefixes | None = kept if runner.extends else None
        self._runner = runner
        self._adapter = adapter
        self._kv = kv
        self._bytes_per_token = bytes_per_token
        self._rows: list[tuple[list[int], Images, Any]] = []
        self._waiting: list[Context] = []

    @property
    def kv_bytes(self) -> int:
        """See ``RowDecoder``; 0 where it is not known."""
        return self._bytes_with(())

    def join(self, context: Context) -> None:
        """See ``RowDecoder``."""
        self._waiting.append(context)

    def leave(self, context: Context) -> None:
        """See ``RowDecoder``."""
        self._waiting = [each for each in self._waiting if each is not context]

    def step(self, tokens: Sequence[int]) -> tuple[Tensor, list[Context]]:
        """See ``RowDecoder``."""
        logits: list[Tensor] = []
        new: list[tuple[list[int], Images, Any]] = []
        for row, token in enumerate(tokens):
            whole, images, cache = self._rows[row]
            whole.append(token)
            found, cache = self._runner.go_on(self._adapter, cache, whole, images)
            self._rows[row] = (whole, images, cache)
            logits.append(found)
        for context in self._waiting:
            found, cache = self._read(context)
            new += [
                (list(context.tokens), context.images, copy.deepcopy(cache) if more else cache)
                for more in range(context.rows)
            ]
            logits.append(found)
        stacked = torch.stack(logits)
        self._rows += new
        read, self._waiting = self._waiting, []
        return stacked, read

    def _read(self, context: Context) -> tuple[Tensor, Any]:
        """``ExactRunner.read`` of a context, from what is kept; what was read is kept in turn."""
        tokens, images, kept = context.tokens, context.images, self._prefixes
        if kept is None or not images:
            return self._runner.read(self._adapter, tokens, images)
        prefix = kept.find(self._policy, tokens, images)
        if prefix is not None:
            context.known = prefix.length
        else:  # another question about the same images goes on from their end
            seen = tokens[: images[-1].end]
            logits, cache = self._runner.read(self._adapter, seen, images)
            prefix = kept.keep(self._policy, seen, images, cache, logits)
        if prefix.length == len(tokens) and prefix.logits is not None:
            return prefix.logits, copy.deepcopy(prefix.cache)
        cache, new = copy.deepcopy(prefix.cache), len(tokens) - prefix.length
        logits, cache = self._runner.go_on(self._adapter, cache, tokens, images, new=new)
        kept.keep(self._policy, tokens, images, copy.deepcopy(cache), logits)
        return logits, cache

    def remove(self, row: int, tokens: list[int] | None) -> None:
        """See ``RowDecoder``; only sequences with images are kept."""
        whole, images, cache = self._rows[row]
        try:
            if tokens is not None and images and self._prefixes is not None:
                self._prefixes.keep(self._policy, whole, images, cache)
        finally:
            last = self._rows.pop()
            if row < len(self._rows):
                self._rows[row] = last

    def keep(self, tokens: list[int], store: SlotStore, slot: int) -> None:
        """See ``RowDecoder``; nothing is kept."""

    def fits(self, contexts: Sequence[Context]) -> bool:
        """See ``RowDecoder``. Without a budget only the number of rows is bounded."""
        return self._kv is None or self._kv.takes(self._bytes_with(contexts), of=self)

    def _bytes_with(self, contexts: Sequence[Context]) -> int:
        tokens = sum(len(whole) + 1 for whole, _, _ in self._rows)
        tokens += sum(context.rows * (len(context.tokens) + 1) for context in (*self._waiting, *contexts))
        return tokens * self._bytes_per_token

    def close(self) -> None:
        """See ``RowDecoder``."""
        self._rows.clear()
        self._waiting.clear()
