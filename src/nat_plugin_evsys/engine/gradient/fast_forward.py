"""The fast forward pass: each distinct prefix of a step's Datums is computed once, without padding and without masks.

``FastForward`` gives what ``forward.hidden_rows`` and ``forward.target_logprobs`` give for padded batches. A model
uses it only after a probe has shown that its hidden states are the same either way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from nat_plugin_evsys.engine.gradient.datums import Example
from nat_plugin_evsys.engine.machine.memory import MemoryModel, SavedBytes
from nat_plugin_evsys.engine.model.forward import OutputHead
from nat_plugin_evsys.engine.model.loading import BaseModel
from nat_plugin_evsys.engine.model.long_rope import long_rope_limit
from nat_plugin_evsys.engine.model.lora import LoraAdapter, applied
from nat_plugin_evsys.engine.model.targets import text_decoder
from nat_plugin_evsys.engine.tree.attention import attending
from nat_plugin_evsys.engine.tree.fused_decoder import FusedDecoder
from nat_plugin_evsys.engine.tree.plan import TreePlan
from nat_plugin_evsys.engine.tree.recompute import install, recomputing
from nat_plugin_evsys.engine.tree.trie import Ids, TokenTrie
from nat_plugin_evsys.engine.tree.unembedding import Pairs, pair_logprobs

_PROBE_TOKENS = (16, 80)


@dataclass(frozen=True)
class Reads:
    """Which positions of a Datum are read, (N,) bool on the CPU each.

    Attributes:
        wanted: their logprobs are computed.
        gradient: their logprobs carry gradient; a part of ``wanted``.
    """

    wanted: Tensor
    gradient: Tensor

    @property
    def length(self) -> int:
        """Tokens up to the last wanted position."""
        places = self.wanted.nonzero()
        return int(places[-1]) + 1 if len(places) else 0


class FastForward:
    """Forward passes of one base model over packs.

    Attributes:
        longest: tokens of the longest sequence that it accepts; None means any. A sliding-window layer attends to
            everything only while a sequence is no longer than its window.
        most_rows: rows of a pack, unless a single sequence has more; None means any.
        rope_limit: a pack holds sequences up to this many tokens, or longer ones, which have another rotary table;
            None means any.
        fused: the decoder as ``fused_decoder`` computes it; None where it goes through transformers' classes.
        recomputed: how many layers ``keep=False`` computes again; 0 where it keeps everything nevertheless.
    """

    def __init__(self, base: BaseModel, head: OutputHead, *, fuse: bool = True) -> None:
        self._base = base
        self._head = head
        self.longest = _shortest_window(base)
        self.most_rows = _rows_below_attention_temperature(base)
        self.rope_limit = long_rope_limit(base.model)
        self.fused = FusedDecoder.of(base.model) if fuse else None
        self.recomputed = install(text_decoder(base.model)) if self.fused is None else len(self.fused.layers)

    def takes(self, length: int) -> bool:
        """Whether a sequence of ``length`` tokens may be in a pack."""
        return self.longest is None or length <= self.longest

    def computed_tokens(self, length: int, wanted: int) -> int:
        """Tokens that a pack holds of a sequence of ``length`` of which the first ``wanted`` are needed.

        All of them where fewer would have another rotary table.
        """
        return length if self.rope_limit is not None and length > self.rope_limit else wanted

    def one_table_each(self, members: Sequence[int], tokens: Sequence[int]) -> list[list[int]]:
        """``members`` in groups that may share a pack, given the tokens that a pack holds of each sequence."""
        limit = max(tokens, default=0) if self.rope_limit is None else self.rope_limit
        groups = [[i for i in members if tokens[i] <= limit], [i for i in members if tokens[i] > limit]]
        return [group for group in groups if group]

    def hidden(self, trie: TokenTrie, read: Tensor, adapter: LoraAdapter | None, *, keep: bool = True) -> Tensor:
        """Last hidden states of the trie's rows ``read`` (R,), rising: [R, H].

        With ``keep=False`` the layers keep their input only and are computed again in the backward pass.
        """
        if self.fused is not None:
            return self.fused.hidden(trie, read, adapter, keep=keep)
        device = self._base.device
        ids = torch.from_numpy(trie.tokens)[None].to(device)
        positions = torch.from_numpy(trie.depths)[None].to(device)
        along = partial(_along, TreePlan.build(trie, device), adapter)
        with along(), nullcontext() if keep else recomputing(along):
            out = text_decoder(self._base.model)(input_ids=ids, position_ids=positions, use_cache=False)
        hidden: Tensor = out.last_hidden_state[0]
        return hidden if len(read) == len(hidden) else hidden[read.to(device)]

    def memory_model(self, adapter: LoraAdapter, *, keep: bool = True) -> MemoryModel:
        """What a pack's forward pass with this adapter keeps for the backward pass."""
        small, large = ((n, self._kept(adapter, np.arange(n) % self._base.vocab_size, keep)) for n in _PROBE_TOKENS)
        return MemoryModel.fit(small, large)

    def _kept(self, adapter: LoraAdapter, tokens: Ids, keep: bool) -> float:
        saved = SavedBytes([*self._base.model.parameters(), *(t for _, t in adapter.named_tensors())])
        with torch.enable_grad(), saved.counting():
            self.hidden(TokenTrie.build([tokens]), torch.arange(len(tokens)), adapter, keep=keep)
        if keep or self.recomputed == 0:
            return saved.total
        # One layer at a time has what it keeps otherwise.
        return saved.total + (self._kept(adapter, tokens, keep=True) - saved.total) / self.recomputed

    def logprobs(
        self,
        adapter: LoraAdapter | None,
        trie: TokenTrie,
        examples: Sequence[Example],
        reads: Sequence[Reads],
        *,
        keep: bool = True,
    ) -> list[tuple[Tensor, Tensor]]:
        """Of each Datum: logprobs in the shape of its targets, 0 where not wanted; entropy (N,), 0 without gradient.

        Args:
            adapter: the adapter.
            trie: over the Datums' tokens, each up to its last wanted position at least.
            examples: the Datums.
            reads: which positions of each are wanted.
            keep: see ``hidden``.
        """
        places = [r.wanted.nonzero().squeeze(1) for r in reads]
        read, at = torch.cat([torch.from_numpy(r)[p] for r, p in zip(trie.rows, places, strict=True)]).unique(
            return_inverse=True
        )
        hidden = self.hidden(trie, read, adapter, keep=keep)
        temperature = None
        if any(e.temperature is not None for e in examples):
            of_places = torch.cat([temperature_of(e)[p] for e, p in zip(examples, places, strict=True)])
            hidden, at, temperature = _by_temperature(hidden, at, of_places)
        rows = at.split([len(p) for p in places])
        targets = [_matrix(e.targets)[p] for e, p in zip(examples, places, strict=True)]
        gradient = [r.gradient[p] for r, p in zip(reads, places, strict=True)]
        lp, entropy = self._of_rows(adapter, hidden, rows, targets, gradient, temperature)
        out = []
        for e, place, row, part in zip(examples, places, rows, lp, strict=True):
            shape, place = _matrix(e.targets).shape, place.to(hidden.device)
            whole = lp[0].new_zeros(shape).index_copy(0, place, part)
            entropies = entropy.new_zeros(len(e)).index_copy(0, place, entropy[row.to(hidden.device)])
            out.append((whole.view(e.targets.shape), entropies))
        return out

    def _of_rows(
        self,
        adapter: LoraAdapter | None,
        hidden: Tensor,
        rows: Sequence[Tensor],
        targets: Sequence[Tensor],
        gradient: Sequence[Tensor],
        temperature: Tensor | None,
    ) -> tuple[list[Tensor], Tensor]:
        """Logprobs of ``targets[i] [n, K]`` at ``rows[i] [n]``, and the entropy of each row of ``hidden``, [R].

        ``temperature`` (R,) divides the logits of each row.
        """
        vocabulary, device = self._base.vocab_size, hidden.device
        # Datums that share a row and a target there share the pair; np.unique sorts by row as well.
        keys = torch.cat([(r[:, None] * vocabulary + t).reshape(-1) for r, t in zip(rows, targets, strict=True)])
        unique, inverse = np.unique(keys.numpy(), return_inverse=True)
        flat = torch.cat([g[:, None].expand_as(t).reshape(-1) for g, t in zip(gradient, targets, strict=True)])
        with_gradient = np.zeros(len(unique), dtype=bool)
        with_gradient[inverse[flat.numpy()]] = True
        key = torch.from_numpy(unique).to(device)
        pairs = Pairs(key // vocabulary, key % vocabulary)
        read = torch.from_numpy(with_gradient).to(device)
        lp, entropy = pair_logprobs(self._head, adapter, hidden, pairs, read, temperature)
        parts = lp[torch.from_numpy(inverse).to(device)].split([t.numel() for t in targets])
        return [p.view(t.shape) for p, t in zip(parts, targets, strict=True)], entropy


@contextmanager
def _along(plan: TreePlan, adapter: LoraAdapter | None) -> Iterator[None]:
    with applied(adapter), attending(plan):
        yield


def temperature_of(example: Example) -> Tensor:
    """The temperature of each position, (N,)."""
    return torch.ones(len(example)) if example.temperature is None else example.temperature


def _by_temperature(hidden: Tensor, at: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A row for each pair of a row and a temperature that is read there.

    Args:
        hidden: [R, H].
        at: (P,) the row that each place reads; ``temperature``: (P,) at which.

    Returns:
        ``(hidden [R', H], the place's row among them (P,), temperature of each row (R',))``.
    """
    keys, inverse = torch.stack([at.double(), temperature.double()]).unique(dim=1, return_inverse=True)
    return hidden[keys[0].long().to(hidden.device)], inverse, keys[1].float().to(hidden.device)


def _matrix(targets: Tensor) -> Tensor:
    """(N,) or (N, K) -> (N, K)."""
    return targets if targets.dim() == 2 else targets[:, None]


def _shortest_window(base: BaseModel) -> int | None:
    """Tokens up to which every layer attends to everything before it; None if without end."""
    config = base.model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention", "chunked_attention"])
    windows = []
    if "sliding_attention" in kinds and getattr(config, "use_sliding_window", True):
        windows.append(getattr(config, "sliding_window", None))
    if "chunked_attention" in kinds:
        windows.append(getattr(config, "attention_chunk_size", None))
    return min((w for w in windows if w), default=None)


def _rows_below_attention_temperature(base: BaseModel) -> int | None:
    """Rows that have the same attention at any depth. Llama 4 scales a query by its row, not by its position."""
    config = base.model.config.get_text_config()
    return config.floor_scale - 1 if getattr(config, "attn_temperature_tuning", False) else None
