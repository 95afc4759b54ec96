"""Rows over spans of the tree: no padding, shared prefixes once, prompts read in pieces beside the decoding rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nat_plugin_evsys.engine.model.lora import LoraAdapter
from nat_plugin_evsys.engine.sampling.budgets import KVBudget
from nat_plugin_evsys.engine.sampling.kv_cache import SlotStore
from nat_plugin_evsys.engine.sampling.row_decoder import Context
from nat_plugin_evsys.engine.spans.attention import Level, Piece, SpanPlan
from nat_plugin_evsys.engine.spans.levels import Chain, levels_of
from nat_plugin_evsys.engine.spans.rollout_model import RolloutModel
from nat_plugin_evsys.engine.spans.slots import FIRST_LENGTH, RowSlots, Slot, length_for
from nat_plugin_evsys.engine.spans.tree import Span, SpanTree

_SHARED = 256
"""Rows times tokens from which on a span is better read once for all its rows than by each row in its slot: a read is
a call of its own, and a slot one more part of a call that all rows share."""
_MOST_TAKEN = 128
"""Tokens of its context that a row may have in its slot."""


@dataclass
class _Row:
    """A row reads the path of ``above``, and what its slot is filled with.

    Attributes:
        last: the last span of its context, which it holds.
        above: that one, or where the end of the context is in the slot one before it.
        context: tokens of the context; the last ``taken`` of them are in the slot, before what was sampled.
    """

    last: Span
    above: Span
    context: int
    taken: int
    slot: Slot

    @property
    def position(self) -> int:
        """Of its next token."""
        return self.context - self.taken + self.slot.filled


@dataclass
class _Feed:
    """``count`` tokens of a span from ``at`` on, at ``start`` in the pass."""

    span: Span
    at: int
    count: int
    start: int


@dataclass
class SpanPass:
    """A pass over ``ids`` at ``positions`` [T], whose logits at ``at`` are wanted.

    Attributes:
        slots: of the rows, whose tokens come first. The plan lacks them: other decoders may share their slots.
        feeds: what it reads of waiting contexts; ``finished`` are those that it completes.
    """

    ids: Tensor
    positions: Tensor
    plan: SpanPlan
    at: Tensor
    slots: list[Slot]
    feeds: list[_Feed]
    finished: list[Context]


class SpanDecoder:
    """The fast ``RowDecoder``. A row's slot has the end of its context, if it is short, and what was sampled since.

    Args:
        model: of all policies. tree: theirs too.
        policy: this one's ident in the tree and in the model. adapter: its adapter.
        pass_tokens: most tokens of waiting contexts in one pass.
        kv: memory for what the rows hold, roughly.
        slots: for its rows; those of other decoders that share them are in every pass, too.
    """

    def __init__(
        self,
        model: RolloutModel,
        tree: SpanTree,
        policy: int,
        adapter: LoraAdapter | None,
        *,
        pass_tokens: int,
        kv: KVBudget,
        slots: RowSlots,
    ) -> None:
        self.slots = slots
        self.policy = policy
        self.adapter = adapter
        self.pass_tokens = pass_tokens
        self._model = model
        self._tree = tree
        self._kv = kv
        self._rows: list[_Row] = []
        self._waiting: dict[Context, Span] = {}
        self._levels: list[Level] | None = None

    @property
    def kv_bytes(self) -> int:
        """See ``RowDecoder``. Without the tree, which is all policies'."""
        return self._bytes_with(())

    def join(self, context: Context) -> None:
        """See ``RowDecoder``."""
        self._waiting[context], context.known = self._tree.hold(self.policy, context.tokens)

    def leave(self, context: Context) -> None:
        """See ``RowDecoder``."""
        last = self._waiting.pop(context, None)
        if last is not None:
            self._tree.release(last)

    def step(self, tokens: Sequence[int]) -> tuple[Tensor, list[Context]]:
        """See ``RowDecoder``."""
        planned = self.plan(tokens, self.pass_tokens)
        planned.plan.own = self.slots.own_tokens({slot: token for token, slot in enumerate(planned.slots)})
        self._model.versions.use(self.policy, self.adapter)
        logits = self._model.logits(self.adapter, planned.ids, planned.positions, planned.plan, planned.at)
        self.advance(planned)
        return self.enter(planned, logits)

    def plan(self, tokens: Sequence[int], room: int) -> SpanPass:
        """The pass that ``step`` makes, with at most ``room`` tokens of waiting contexts."""
        feeds, finished = self._feeds(len(tokens), room)
        ids, positions = list(tokens), [row.position for row in self._rows]
        for feed in feeds:
            first = _depth(feed.span) + feed.at
            ids += feed.span.tokens[feed.at : feed.at + feed.count]
            positions += range(first, first + feed.count)
        at = [*range(len(tokens)), *(finished.values())]
        plan = SpanPlan(len(ids), [], [Piece(f.start, f.start + f.count, f.span.kv, f.at) for f in feeds])
        plan.levels = self._row_levels() if not feeds else levels_of(self._chains(feeds))
        wanted, slots = torch.tensor(at, dtype=torch.long), [row.slot for row in self._rows]
        return SpanPass(torch.tensor(ids), torch.tensor(positions), plan, wanted, slots, feeds, list(finished))

    def advance(self, made: SpanPass) -> None:
        """Count the tokens of a pass that has been made. Until then another pass would set all of it again."""
        self._model.fed_tokens += len(made.ids)
        for feed in made.feeds:
            feed.span.filled = max(feed.span.filled, feed.at + feed.count)
        for row in self._rows:
            row.slot.filled += 1

    def enter(self, made: SpanPass, logits: Tensor) -> tuple[Tensor, list[Context]]:
        """What ``step`` returns, after ``advance`` of all decoders that share the slots: these move."""
        if made.finished:
            self._enter(made.finished)
        return logits, made.finished

    def remove(self, row: int, tokens: list[int] | None) -> None:
        """See ``RowDecoder``."""
        gone, last = self._rows[row], self._rows.pop()
        if row < len(self._rows):
            self._rows[row] = last
        self._levels = None
        filled = gone.slot.filled
        try:
            if tokens is not None and filled > gone.taken:
                sampled = tokens[len(tokens) - (filled - gone.taken) :]
                self._tree.add(gone.last, sampled, self.slots.read(gone.slot, gone.taken, filled))
        finally:
            self._tree.release(gone.last)
            self.slots.free(gone.slot, failed=tokens is None)

    def keep(self, tokens: list[int], store: SlotStore, slot: int) -> None:
        """See ``RowDecoder``."""
        self._tree.keep(self.policy, tokens, store.read(slot, 0, len(tokens)))

    def fits(self, contexts: Sequence[Context]) -> bool:
        """See ``RowDecoder``."""
        missing = sum(self._tree.missing(self.policy, context.tokens) for context in contexts)
        in_tree = self._tree.held_bytes + self.slots.layout.bytes_per_token * missing
        return self._kv.takes(in_tree + self._bytes_with(contexts), of=self)

    def _bytes_with(self, contexts: Sequence[Context]) -> int:
        """Of the slots of its rows, and of those that wait or would."""
        tokens = sum(max(row.slot.group.store.length, length_for(row.slot.filled + 1)) for row in self._rows)
        for context in (*self._waiting, *contexts):
            tokens += context.rows * length_for(_room(min(_MOST_TAKEN, len(context.tokens)), context))
        return self.slots.layout.bytes_per_token * tokens

    def part(self) -> None:
        """Give its rows slots that no other decoder shares."""
        shared, self.slots = self.slots, RowSlots(self.slots.layout)
        self.slots.adopt([row.slot for row in self._rows], shared)

    def close(self) -> None:
        """See ``RowDecoder``."""
        for span in (*self._waiting.values(), *(row.last for row in self._rows)):
            self._tree.release(span)
        for row in self._rows:
            self.slots.free(row.slot, failed=True)
        self._waiting.clear()
        self._rows.clear()
        self._model.versions.done(self.policy)

    def _enter(self, contexts: Sequence[Context]) -> None:
        """Rows for contexts that have been read; they share their holds."""
        lasts = [self._waiting[context] for context in contexts]
        self._share(contexts, lasts, 1)
        ends = [_short_end(last) for last in lasts]
        lengths = [sum(piece.shape[3] for piece in pieces) for _, pieces in ends]
        new = [i for i, context in enumerate(contexts) for _ in range(context.rows)]
        try:
            slots = self.slots.enter([(ends[i][1], _room(lengths[i], contexts[i])) for i in new])
        except Exception:
            self._share(contexts, lasts, -1)
            raise
        for context in contexts:
            del self._waiting[context]
        for i, slot in zip(new, slots, strict=True):
            self._rows.append(_Row(lasts[i], ends[i][0], len(contexts[i].tokens), lengths[i], slot))
        self._levels = None

    def _share(self, contexts: Sequence[Context], lasts: Sequence[Span], sign: int) -> None:
        """Holds for all rows of contexts, beside the one that each has; or those back, with a ``sign`` of -1."""
        for context, last in zip(contexts, lasts, strict=True):
            self._tree.share(last, sign * (context.rows - 1))

    def _feeds(self, start: int, room: int) -> tuple[list[_Feed], dict[Context, int]]:
        """Pieces of spans that waiting contexts need, first come first served, from row ``start`` of the pass on.

        Also, of each context that they complete, the row of its last token. A context whose last token was computed
        before feeds that one again, for its logits.
        """
        feeds: dict[Span, _Feed] = {}
        finished: dict[Context, int] = {}
        for context, last in self._waiting.items():
            for span in last.path():
                todo = len(span.tokens) - span.filled
                if todo and span not in feeds:
                    feeds[span] = _Feed(span, span.filled, min(todo, max(0, room)), start)
                elif span is last and span not in feeds:
                    feeds[span] = _Feed(span, len(span.tokens) - 1, 1, start)
                else:
                    feed = feeds.get(span)
                    if feed is not None and feed.at + feed.count < len(span.tokens):
                        break
                    continue
                start += feeds[span].count
                room -= feeds[span].count
                if feeds[span].at + feeds[span].count < len(span.tokens):
                    break
            else:
                finished[context] = feeds[last].start + feeds[last].count - 1
            if room <= 0:
                break
        return [feed for feed in feeds.values() if feed.count], finished

    def _row_levels(self) -> list[Level]:
        if self._levels is None:
            self._levels = levels_of(self._chains([]))
        return self._levels

    def _chains(self, feeds: Sequence[_Feed]) -> list[tuple[range, Chain]]:
        """Tokens of the pass, and what they see above."""
        out = [(range(i, i + 1), _whole(row.above.path())) for i, row in enumerate(self._rows)]
        for feed in feeds:
            chain = _whole(feed.span.path()[:-1])
            if feed.at:
                chain.append((feed.span.kv, feed.at))
            out.append((range(feed.start, feed.start + feed.count), chain))
        return out


def _short_end(last: Span) -> tuple[Span, list[Tensor]]:
    """The keys and values that end with ``last`` and are quicker read in a row's slot, and the span above them."""
    pieces: list[Tensor] = []
    room = _MOST_TAKEN
    while last.parent is not None and len(last.tokens) <= room and len(last.tokens) * last.holders <= _SHARED:
        pieces.insert(0, last.kv)
        room -= len(last.tokens)
        last = last.parent
    return last, pieces


def _room(taken: int, context: Context) -> int:
    """Tokens that a new row's slot has room for: the first that it samples, too, as far as it may."""
    return taken + max(1, min(context.most, FIRST_LENGTH))


def _whole(path: list[Span]) -> Chain:
    return [(span.kv, len(span.tokens)) for span in path]


def _depth(span: Span) -> int:
    return sum(len(above.tokens) for above in span.path()[:-1])
