"""Constrained decoding: which tokens a grammar allows next, by llguidance (https://github.com/guidance-ai/llguidance).

A grammar is text in llguidance's Lark dialect. Its masks are exact over bytes, whatever the tokenizer: a token is
allowed if the reply so far and the token's bytes can still become a sentence of the grammar. Text that the grammar
leaves no choice about is allowed in one tokenisation only, the tokenizer's own.

llguidance is imported when a grammar is: the engine samples without it.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nat_plugin_evsys.errors import DataError, UnsupportedError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer


class GrammarState:
    """One sequence's place in its grammar.

    Attributes:
        allowed: bool (V,), the tokens that may come next; never all False before the sequence has ended.
        ended: the grammar takes no more, and there is no token that ends a sequence.
    """

    __slots__ = ("_constraint", "_matcher", "allowed", "ended")

    def __init__(self, constraint: Constraint, matcher: LLMatcher) -> None:
        self._constraint = constraint
        self._matcher = matcher
        self.ended = False
        self.allowed = self._mask()

    @property
    def is_forced(self) -> bool:
        """Whether one token only may come next."""
        return int(np.count_nonzero(self.allowed)) == 1

    def accept(self, token: int) -> None:
        """Go on after an allowed token.

        Raises:
            DataError: the grammar became too complex to follow, or the token was not allowed.
        """
        if token in self._constraint.ends:
            self.ended = True
            return
        if not self._matcher.consume_token(token):
            raise _broken(self._matcher)
        if not self._constraint.ends and self._matcher.is_accepting():
            self.ended = True
            return
        self.allowed = self._mask()

    def _mask(self) -> NDArray[np.bool_]:
        from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

        constraint = self._constraint
        bits = allocate_token_bitmask(1, constraint.vocab_size)
        fill_next_token_bitmask(self._matcher, bits)
        if self._matcher.is_error():
            raise _broken(self._matcher)
        allowed = np.unpackbits(bits[0].view(np.uint8), bitorder="little")[: constraint.vocab_size].astype(bool)
        # What ends a reply is the chat template's choice, not the tokenizer's.
        may_end = bool(allowed[list(constraint.eos)].any()) or self._matcher.is_accepting()
        allowed[list(constraint.eos)] = False
        allowed[list(constraint.ends)] = may_end
        return allowed


@dataclass(frozen=True)
class Constraint:
    """A compiled grammar that a request's samples follow.

    Attributes:
        prefix: token ids that the grammar forces before any choice; they end the prompt and are not sampled.
        ends: ids that end a sequence once the grammar's sentence is complete.
        ignored: what of the grammar's JSON schemas has no effect, in llguidance's words.
        source: the grammar's text, from which another process compiles the same.
    """

    prefix: list[int]
    ends: frozenset[int]
    ignored: list[str]
    vocab_size: int
    eos: frozenset[int]
    matcher: LLMatcher
    source: str

    def begin(self) -> GrammarState:
        """The state after ``prefix``."""
        return GrammarState(self, self.matcher.deep_copy())

    def forced(self, tokens: Sequence[int]) -> list[int]:
        """Positions in sampled ``tokens`` at which there was one choice only."""
        state, forced = self.begin(), []
        for position, token in enumerate(tokens):
            if state.is_forced:
                forced.append(position)
            state.accept(token)
            if state.ended:
                break
        return forced


class Grammars:
    """Compiles grammars for one tokenizer. Safe to share between threads.

    Args:
        vocab_size: of the model, V; tokens that only the model has are never allowed.
        eos: ids that end a sequence.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, eos: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos = eos
        self._lock = threading.Lock()
        self._wrapped: LLTokenizer | None = None

    def compile(self, grammar: str, ends: Sequence[int]) -> Constraint:
        """Compile a grammar. The first call takes about a second, to read the tokenizer.

        Args:
            ends: the ids that end a reply; with none a sequence ends as soon as its sentence may.

        Raises:
            DataError: the grammar or one of its schemas is malformed or too complex.
            UnsupportedError: the tokenizer is not one that llguidance reads.
        """
        from llguidance import LLMatcher

        wrapped = self._wrap()
        is_error, messages = LLMatcher.validate_grammar_with_warnings(grammar, wrapped)
        if is_error:
            raise DataError(f"the form that is asked for cannot be compiled: {_one_line(messages[0])}")
        matcher = LLMatcher(wrapped, grammar, log_level=0)
        prefix = matcher.compute_ff_tokens()
        if matcher.is_error() or not matcher.consume_tokens(prefix):
            raise _broken(matcher)
        eos = frozenset([*self._eos, *wrapped.eos_tokens])
        return Constraint(prefix, frozenset(ends), messages, self._vocab_size, eos, matcher, grammar)

    def _wrap(self) -> LLTokenizer:
        from llguidance.hf import from_tokenizer

        with self._lock:
            if self._wrapped is None:
                try:
                    self._wrapped = from_tokenizer(
                        self._tokenizer, n_vocab=self._vocab_size, eos_token=sorted(self._eos) or None
                    )
                except Exception as error:
                    kind = type(self._tokenizer).__name__
                    raise UnsupportedError(f"llguidance cannot read the tokenizer ({kind}): {error}") from error
            return self._wrapped


def _broken(matcher: LLMatcher) -> DataError:
    return DataError(f"the reply's grammar cannot be followed any further: {_one_line(matcher.get_error())}")


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]
