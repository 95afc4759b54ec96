"""Rows over slots of one store: each row's whole context in its slot, padded passes, any model. The plain way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nat_plugin_evsys.engine.model.lora import LoraAdapter
from nat_plugin_evsys.engine.sampling.budgets import KVBudget
from nat_plugin_evsys.engine.sampling.kv_cache import SlotStore, rounded_length
from nat_plugin_evsys.engine.sampling.model_runner import ModelRunner
from nat_plugin_evsys.engine.sampling.prefix_cache import PrefixCache
from nat_plugin_evsys.engine.sampling.row_decoder import Context


class SlotDecoder:
    """The plain ``RowDecoder``, which the fast one is tested against. Slot i has all tokens of row i.

    Args:
        runner: the model. prefixes: what earlier rows computed.
        policy: this one's ident in ``prefixes``. adapter: its adapter.
        kv: memory for the slots, roughly.
        store: an unused store to reuse.
    """

    def __init__(
        self,
        runner: ModelRunner,
        prefixes: PrefixCache,
        policy: int,
        adapter: LoraAdapter | None,
        *,
        kv: KVBudget,
        store: SlotStore,
    ) -> None:
        self.store = store
        self._runner = runner
        self._prefixes = prefixes
        self._policy = policy
        self._adapter = adapter
        self._kv = kv
        self._tokens: list[list[int]] = []
        self._waiting: list[Context] = []

    @property
    def kv_bytes(self) -> int:
        """See ``RowDecoder``."""
        return self.store.nbytes

    def join(self, context: Context) -> None:
        """See ``RowDecoder``."""
        self._waiting.append(context)

    def leave(self, context: Context) -> None:
        """See ``RowDecoder``."""
        self._waiting = [each for each in self._waiting if each is not context]

    def step(self, tokens: Sequence[int]) -> tuple[Tensor, list[Context]]:
        """See ``RowDecoder``."""
        logits = []
        if tokens:
            lengths = [len(row) for row in self._tokens]
            logits.append(self._runner.decode(self._adapter, self.store, list(tokens), lengths))
            for row, token in zip(self._tokens, tokens, strict=True):
                row.append(token)
            self._cross_limit(logits[0])
        # Shortest first, so that padding stays small.
        contexts = sorted(self._waiting, key=lambda c: len(c.tokens))
        if contexts:
            logits.append(self._prefill(contexts))
        joined = torch.cat(logits)
        self._tokens += [list(c.tokens) for c in contexts for _ in range(c.rows)]
        self._waiting.clear()
        return joined, contexts

    def remove(self, row: int, tokens: list[int] | None) -> None:
        """See ``RowDecoder``."""
        try:
            if tokens is None:
                # A failed row may hold NaN, which would reach the slot's next owner through its masked columns.
                self.store.wipe(row)
            else:
                self.keep(tokens, self.store, row)
        finally:
            last = self._tokens.pop()
            if row < len(self._tokens):
                self.store.copy(len(self._tokens), row, len(last))
                self._tokens[row] = last

    def keep(self, tokens: list[int], store: SlotStore, slot: int) -> None:
        """See ``RowDecoder``."""
        self._prefixes.add(self._ident(tokens), tokens, store, slot)

    def fits(self, contexts: Sequence[Context]) -> bool:
        """See ``RowDecoder``."""
        new = [*self._waiting, *contexts]
        rows = len(self._tokens) + sum(c.rows for c in new)
        longest = max((len(t) + 1 for t in (*self._tokens, *(c.tokens for c in new))), default=0)
        if rows <= self.store.slots and longest <= self.store.length:
            return True
        per_row = self.store.layout.bytes_per_token * max(self.store.length, rounded_length(longest))
        # While a store grows it is there twice.
        return self._kv.takes(self.store.nbytes + rows * per_row, of=self)

    def close(self) -> None:
        """See ``RowDecoder``."""
        self._tokens.clear()
        self._waiting.clear()

    def _prefill(self, contexts: list[Context]) -> Tensor:
        """Read the contexts, each once, and copy its slot for its other rows: logits [len(contexts), V]."""
        first = len(self._tokens)
        rows = sum(c.rows for c in contexts)
        self.store.reserve(first + rows, max(len(c.tokens) for c in contexts) + 1)
        for i, context in enumerate(contexts):
            context.known = self._prefixes.load(self._ident(context.tokens), context.tokens, self.store, first + i)
        tokens, starts = [c.tokens for c in contexts], [c.known for c in contexts]
        logits = self._runner.prefill(self._adapter, self.store, first, tokens, starts)
        end = first + rows
        # From the last context down: its rows lie at or behind its slot, and behind the slots of those before it.
        for i in range(len(contexts) - 1, -1, -1):
            length = len(contexts[i].tokens)
            self.keep(contexts[i].tokens, self.store, first + i)
            for row in range(end - 1, end - 1 - contexts[i].rows, -1):
                if row != first + i:
                    self.store.copy(first + i, row, length)
            end -= contexts[i].rows
        return logits

    def _cross_limit(self, logits: Tensor) -> None:
        """Read rows again whose last token took them over ``rope_limit``, and replace their logits [rows, V]."""
        limit = self._runner.rope_limit
        for row, tokens in enumerate(self._tokens):
            if limit is not None and len(tokens) == limit + 1:
                logits[row] = self._runner.prefill(self._adapter, self.store, row, [tokens], [0])[0]

    def _ident(self, tokens: list[int]) -> tuple[int, bool]:
        """Of the policy in ``prefixes``: what long sequences keep is of no use to short ones."""
        return self._policy, self._runner.rope_limit is not None and len(tokens) > self._runner.rope_limit
