"""When a sequence ends: EOS, stop token ids, and stop strings found in decoded text across token borders."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from nat_plugin_evsys.errors import DataError

_REPLACEMENT = "\ufffd"
_CONTEXT_TOKENS = 4
_MOST_PENDING = 16
_UTF8_TAIL = 3


def eos_token_ids(model: Any, tokenizer: Any, vocab_size: int) -> frozenset[int]:
    """Every id that ends a sequence: of generation_config, of the config and of the tokenizer, as far as below V.

    Chat models often name two (``<|im_end|>`` and ``<|endoftext|>``) in different places; either ends a sequence.
    """
    found: set[int] = set()
    sources = (getattr(model, "generation_config", None), model.config.get_text_config(), tokenizer)
    for source in sources:
        ids = getattr(source, "eos_token_id", None)
        found.update([] if ids is None else [ids] if isinstance(ids, int) else ids)
    return frozenset(i for i in found if 0 <= i < vocab_size)


def ids_without_a_token(tokenizer: Any, vocab_size: int, eos: Iterable[int]) -> list[int]:
    """The ids below V that stand for nothing: the rows that pad a model's head. They would decode to no text.

    An end of the sequence is never among them; nor is any id if the tokenizer is None.
    """
    if tokenizer is None:
        return []
    return sorted(set(range(vocab_size)) - set(tokenizer.get_vocab().values()) - set(eos))


@dataclass(frozen=True)
class StopRule:
    """What ends a sequence before ``max_tokens``.

    Attributes:
        ids: a sampled id among these ends the sequence.
        strings: a decoded text that contains one of these ends it.
    """

    ids: frozenset[int]
    strings: tuple[str, ...]

    @classmethod
    def parse(cls, stop: str | Sequence[str] | Sequence[int] | None, eos: frozenset[int], vocab_size: int) -> StopRule:
        """From ``SamplingParams.stop``: None is EOS only, ``[]`` is nothing at all, anything else is added to EOS.

        Raises:
            DataError: an empty stop string, an id outside the vocabulary, or another type.
        """
        if stop is None:
            return cls(eos, ())
        items: list[Any] = [stop] if isinstance(stop, str) else list(stop)
        if not items:
            return cls(frozenset(), ())
        strings = tuple(item for item in items if isinstance(item, str))
        ids = [item for item in items if isinstance(item, int) and not isinstance(item, bool)]
        if len(strings) + len(ids) != len(items):
            raise DataError(f"stop must be a string, a list of strings or a list of token ids, got {stop!r}")
        if "" in strings:
            raise DataError("stop contains an empty string, which would end every sequence at once; remove it")
        outside = [i for i in ids if not 0 <= i < vocab_size]
        if outside:
            raise DataError(f"stop token id {outside[0]} is outside the vocabulary of {vocab_size} tokens")
        return cls(eos | frozenset(ids), strings)


class StopTextMatcher:
    """Finds stop strings in the text of a growing sequence, one token at a time.

    Tokens are decoded together with the few before them, since one token's text depends on its neighbours (byte-level
    BPE splits characters; SentencePiece drops a leading space). Text after an unfinished UTF-8 character is checked
    but not yet final.
    """

    def __init__(self, tokenizer: Any, strings: tuple[str, ...], prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._strings = strings
        self._keep = max(map(len, strings)) - 1
        self._ids = list(prompt_ids[-_CONTEXT_TOKENS:])
        self._settled = len(self._ids)
        self._base = self._decode(self._settled).rstrip(_REPLACEMENT)
        self._tail = ""

    def push(self, token: int) -> bool:
        """Add a sampled token; True if the text since the prompt now contains a stop string."""
        self._ids.append(token)
        text = self._decode(len(self._ids))
        fresh = text[len(self._base) :]
        seen = self._tail + fresh.rstrip(_REPLACEMENT)
        if any(string in seen for string in self._strings):
            return True
        if fresh and not fresh.endswith(_REPLACEMENT):
            self._settle(len(self._ids), fresh)
        elif len(self._ids) - self._settled > _MOST_PENDING:
            # Bytes that never become a character: settle all but what may still be the start of one.
            upto = len(self._ids) - _UTF8_TAIL
            self._settle(upto, self._decode(upto)[len(self._base) :])
        return False

    def _settle(self, upto: int, text: str) -> None:
        self._tail = (self._tail + text)[-self._keep :] if self._keep else ""
        self._ids = self._ids[self._settled :]
        self._settled = upto - self._settled
        self._base = self._decode(self._settled)

    def _decode(self, end: int) -> str:
        text: str = self._tokenizer.decode(
            self._ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text
