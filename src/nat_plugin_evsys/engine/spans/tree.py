"""Keys and values by token ids and policy: a radix tree of spans, shared by rows and kept after them.

A span holds the keys and values of a run of tokens that follow those of its parents. Equal prefixes are one span,
whoever asks for them and when; a span is split where two sequences diverge. Keys and values depend on the weights:
every policy has a tree of its own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from nat_plugin_evsys.engine.sampling.kv_cache import KVLayout

_MOST_MERGED = 1024


class Span:
    """A run of tokens in a tree.

    Attributes:
        tokens: their ids.
        kv: ``[layers, 2, kv_heads, len(tokens), head_dim]``.
        filled: how many of them have their keys and values.
        holders: rows and waiting contexts that read this span or one below it.
    """

    __slots__ = ("children", "filled", "holders", "kv", "parent", "tokens")

    def __init__(self, tokens: list[int], kv: Tensor, parent: Span | None, filled: int = 0) -> None:
        self.tokens = tokens
        self.kv = kv
        self.parent = parent
        self.filled = filled
        self.holders = 0
        self.children: dict[int, Span] = {}

    def path(self) -> list[Span]:
        """From the first span below the root to this one."""
        out: list[Span] = []
        span: Span | None = self
        while span is not None and span.parent is not None:
            out.append(span)
            span = span.parent
        return out[::-1]


class SpanTree:
    """The trees of all policies. Unheld spans are kept up to a limit; the least recently used leaves go first.

    Args:
        layout: of keys and values.
        max_bytes: limit on the memory of unheld spans; 0 keeps none.

    Attributes:
        used_bytes: memory of unheld spans. held_bytes: of the rest.
    """

    def __init__(self, layout: KVLayout, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.used_bytes = 0
        self.held_bytes = 0
        self._layout = layout
        self._roots: dict[int, Span] = {}
        # Nobody's spans. A parent is put in after its children, so the first one is always a leaf.
        self._idle: OrderedDict[Span, None] = OrderedDict()

    def hold(self, policy: int, tokens: Sequence[int]) -> tuple[Span, int]:
        """The span that ends with the last of ``tokens``, created if missing, and held until ``release``.

        Returns it and how many of the tokens before the last had keys and values already.
        """
        path, at = self._match(self._root(policy), tokens)
        known = sum(span.filled for span in path)
        last = path[-1] if path else self._root(policy)
        if at < len(tokens):
            last = self._append(last, list(tokens[at:]))
        for span in last.path():
            if span.holders == 0:
                self._idle.pop(span, None)
                self._move(span, held=True)
            span.holders += 1
        return last, min(known, len(tokens) - 1)

    def share(self, span: Span, more: int) -> None:
        """Hold a span that is held ``more`` times more, or less if negative."""
        for each in span.path():
            each.holders += more

    def release(self, last: Span) -> None:
        """Release one hold of a span."""
        for span in reversed(last.path()):
            span.holders -= 1
            if span.holders == 0:
                if span.filled < len(span.tokens) or self.max_bytes <= 0:
                    self._drop(span)
                    self.held_bytes -= self._bytes(span)
                else:
                    self._move(span, held=False)
                    self._idle[span] = None
        self._shrink()

    def add(self, last: Span, tokens: list[int], kv: Tensor) -> None:
        """Keep ``kv [layers, 2, kv_heads, len(tokens), head_dim]`` of tokens that follow ``last``, which is held."""
        if self.max_bytes <= 0 or not tokens:
            return
        path, at = self._match(last, tokens)
        if at == len(tokens):
            return
        parent = path[-1] if path else last
        span = Span(tokens[at:], kv[:, :, :, at:].clone(), parent, len(tokens) - at)
        parent.children[tokens[at]] = span
        self.used_bytes += self._bytes(span)
        self._idle[span] = None
        # Its parents, if nobody's, have to stay behind it.
        for above in reversed(path):
            if above in self._idle:
                self._idle.move_to_end(above)
        self._shrink()

    def keep(self, policy: int, tokens: list[int], kv: Tensor) -> None:
        """Keep ``kv [layers, 2, kv_heads, len(tokens), head_dim]`` of tokens at the start of a sequence."""
        self.add(self._root(policy), tokens, kv)

    def missing(self, policy: int, tokens: Sequence[int]) -> int:
        """How many of ``tokens`` no span holds."""
        span, at = self._root(policy), 0
        while at < len(tokens) and (child := span.children.get(tokens[at])) is not None:
            common = _common(child.tokens, tokens, at)
            at += common
            if common < len(child.tokens):
                break
            span = child
        return len(tokens) - at

    def spans(self) -> Iterator[Span]:
        """Every span."""
        stack = list(self._roots.values())
        while stack:
            span = stack.pop()
            stack += span.children.values()
            if span.parent is not None:
                yield span

    def forget(self, policy: int) -> None:
        """Drop the unheld spans of a policy."""
        root = self._roots.get(policy)
        if root is None:
            return
        for span in [span for span in self._idle if span.path()[0].parent is root]:
            self._idle.pop(span)
            self.used_bytes -= self._bytes(span)
            self._drop(span)
        if not root.children:
            del self._roots[policy]

    def clear(self) -> None:
        """Drop everything."""
        self._roots.clear()
        self._idle.clear()
        self.used_bytes = self.held_bytes = 0

    def _root(self, policy: int) -> Span:
        if policy not in self._roots:
            self._roots[policy] = Span([], self._empty(0), None)
        return self._roots[policy]

    def _empty(self, tokens: int) -> Tensor:
        heads, dim = self._layout.widest
        shape = (len(self._layout.layers), 2, heads, tokens, dim)
        return torch.empty(shape, dtype=self._layout.dtype, device=self._layout.device)

    def _match(self, span: Span, tokens: Sequence[int]) -> tuple[list[Span], int]:
        """Spans below ``span`` that spell the start of ``tokens``, the last one split to end with it."""
        path: list[Span] = []
        at = 0
        while at < len(tokens) and (child := span.children.get(tokens[at])) is not None:
            common = _common(child.tokens, tokens, at)
            at += common
            span = self._split(child, common) if common < len(child.tokens) else child
            path.append(span)
            if span is not child:
                break
        return path, at

    def _split(self, span: Span, at: int) -> Span:
        """Cut a span in two; the object keeps the lower part, the upper one is returned. Copies, so each can go."""
        assert span.parent is not None
        upper = Span(span.tokens[:at], span.kv[:, :, :, :at].clone(), span.parent, min(at, span.filled))
        below = span.kv[:, :, :, at:].clone()
        upper.holders = span.holders
        span.parent.children[span.tokens[0]] = upper
        upper.children[span.tokens[at]] = span
        span.tokens, span.kv = span.tokens[at:], below
        span.parent, span.filled = upper, max(0, span.filled - at)
        if span in self._idle:
            self._idle[upper] = None
            for above in reversed(upper.path()[:-1]):
                if above in self._idle:
                    self._idle.move_to_end(above)
        return upper

    def _append(self, last: Span, tokens: list[int]) -> Span:
        """A new span below ``last``. What ends in it and is nobody's becomes part of it, so that paths stay short."""
        merged: list[Span] = []
        size = 0
        while last in self._idle and not last.children and size + len(last.tokens) <= _MOST_MERGED:
            assert last.parent is not None
            merged.append(last)
            size += len(last.tokens)
            self._idle.pop(last)
            self.used_bytes -= self._bytes(last)
            self._drop(last)
            last = last.parent
        before = [token for span in reversed(merged) for token in span.tokens]
        span = Span([*before, *tokens], self._empty(size + len(tokens)), last, size)
        at = 0
        for part in reversed(merged):
            span.kv[:, :, :, at : at + len(part.tokens)] = part.kv
            at += len(part.tokens)
        last.children[span.tokens[0]] = span
        self.used_bytes += self._bytes(span)
        return span

    def _drop(self, span: Span) -> None:
        assert span.parent is not None
        del span.parent.children[span.tokens[0]]

    def _move(self, span: Span, held: bool) -> None:
        change = self._bytes(span) if held else -self._bytes(span)
        self.held_bytes += change
        self.used_bytes -= change

    def _bytes(self, span: Span) -> int:
        return self._layout.bytes_per_token * len(span.tokens)

    def _shrink(self) -> None:
        while self.used_bytes > self.max_bytes and self._idle:
            span, _ = self._idle.popitem(last=False)
            self.used_bytes -= self._bytes(span)
            self._drop(span)


def _common(own: list[int], tokens: Sequence[int], at: int) -> int:
    """How many tokens from ``at`` on are those of a span."""
    if own == tokens[at : at + len(own)]:
        return len(own)
    return next((i for i, (a, b) in enumerate(zip(own, tokens[at:], strict=False)) if a != b), len(tokens) - at)
