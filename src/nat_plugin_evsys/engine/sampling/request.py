"""One sampling request: checked on arrival, filled while it is decoded, answered at the end."""

from __future__ import annotations

import math
import operator
import secrets
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
from tinker import types
from tinker.types.topk_logprobs import MASK_LOGPROB, TopkLogprobs

from nat_plugin_evsys.calls import StopReason
from nat_plugin_evsys.engine.model.images import NoImages, PlacedImage, ReadsImages, images_key, read_model_input
from nat_plugin_evsys.engine.sampling.decoding import stream_keys
from nat_plugin_evsys.engine.sampling.grammars import Constraint
from nat_plugin_evsys.engine.sampling.prompt_scores import PromptScores
from nat_plugin_evsys.engine.sampling.result import SampledSequence, SampleResult
from nat_plugin_evsys.engine.sampling.shaping import Shaping
from nat_plugin_evsys.engine.sampling.stopping import StopRule, StopTextMatcher
from nat_plugin_evsys.errors import DataError, PromptTooLongError

_COLDEST = 1e-6

TokenCallback = Callable[[int, list[int], list[float]], None]
"""``(sample index, new token ids, their logprobs)``, called from the sampler's thread."""


_TEXT_ONLY = NoImages("this sampler reads token ids")


@dataclass(frozen=True)
class Limits:
    """Limits that requests are checked against; ``vision`` reads their images, ``never`` are ids that are not drawn."""

    context_length: int
    vocab_size: int
    eos: frozenset[int]
    vision: ReadsImages | NoImages = _TEXT_ONLY
    never: tuple[int, ...] = ()


class SampleSequence:
    """One of the ``num_samples`` sequences of a request, while it grows."""

    __slots__ = (
        "grammar",
        "index",
        "key",
        "logprobs",
        "matcher",
        "request",
        "seen",
        "stop_reason",
        "tokens",
        "topk_ids",
        "topk_logprobs",
    )

    def __init__(self, request: SampleRequest, index: int, key: int, matcher: StopTextMatcher | None) -> None:
        self.request = request
        self.index = index
        self.key = key
        self.matcher = matcher
        self.grammar = None if request.constraint is None else request.constraint.begin()
        self.seen = None if request.shaping is None else request.shaping.seen(request.prompt)
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.topk_ids: list[np.ndarray] = []
        self.topk_logprobs: list[np.ndarray] = []
        self.stop_reason: StopReason | None = None

    @property
    def length(self) -> int:
        """Tokens so far, prompt included."""
        return len(self.request.prompt) + len(self.tokens)

    def accept(self, token: int, logprob: float) -> None:
        """Append a sampled token and decide whether the sequence ends with it."""
        request = self.request
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if self.seen is not None:
            self.seen.add(token)
        if self._is_last(token):
            self.stop_reason = "stop"
        elif len(self.tokens) >= request.max_tokens:
            self.stop_reason = "length"

    def _is_last(self, token: int) -> bool:
        if token in self.request.stop.ids or (self.matcher is not None and self.matcher.push(token)):
            return True
        if self.grammar is None:
            return False
        self.grammar.accept(token)
        return self.grammar.ended

    def result(self) -> SampledSequence:
        """The finished sequence in Tinker's form."""
        topk = None
        if self.request.topk_sample:
            topk = TopkLogprobs(np.stack(self.topk_ids).astype(np.int32), np.stack(self.topk_logprobs))
        assert self.stop_reason is not None
        return SampledSequence(
            stop_reason=self.stop_reason,
            sequence_id=f"{self.request.ident}-{self.index}",
            tokens_np=np.array(self.tokens, dtype=np.int32),
            logprobs_np=np.array(self.logprobs, dtype=np.float32),
            topk_logprobs_np=topk,
            decode=self.request.decode,
        )


class SampleRequest:
    """A checked request. ``num_samples`` may be 0 when only prompt logprobs are wanted.

    Args:
        prompt: ``ModelInput`` or token ids, length P >= 1.
        num_samples: sequences wanted.
        params: Tinker's sampling parameters, with or without this package's extensions. ``max_tokens`` is cut to the
            room that the context leaves.
        tokenizer: for stop strings and ``text``.
        prompt_last_n: give the logprobs of the last n prompt tokens only.
        prompt_targets, prompt_draws: see ``PromptScores``.
        constraint: a grammar that every sample follows, and whose ``prefix`` the prompt ends with.

    Raises:
        DataError: the prompt is empty, has tokens outside the vocabulary or chunks that the model cannot read; a
            parameter is out of range.
        PromptTooLongError: the prompt leaves no room for one token.
    """

    def __init__(
        self,
        prompt: types.ModelInput | Sequence[int],
        num_samples: int,
        params: types.SamplingParams,
        limits: Limits,
        tokenizer: Any,
        *,
        prompt_logprobs: bool = False,
        topk_prompt: int = 0,
        topk_sample: int = 0,
        prompt_last_n: int | None = None,
        prompt_targets: types.TensorData | None = None,
        prompt_draws: int = 0,
        on_tokens: TokenCallback | None = None,
        constraint: Constraint | None = None,
    ) -> None:
        self.ident = uuid.uuid4().hex
        self.future: Future[Any] = Future()
        self._settled = False
        self.prompt, self.images = _checked_prompt(prompt, limits)
        self.prompt_key = np.array(self.prompt, dtype=np.int64).tobytes() + images_key(self.images)
        self.decode = _text_decoder(tokenizer)
        _check_params(params, num_samples, limits, topk_prompt, topk_sample)
        self.max_tokens = _room(len(self.prompt), num_samples, params.max_tokens, limits.context_length)
        self.temperature, self.top_k, self.top_p = float(params.temperature), int(params.top_k), float(params.top_p)
        self.stop = StopRule.parse(params.stop, limits.eos, limits.vocab_size)
        ends = self.stop.ids | (frozenset() if constraint is None else constraint.ends)
        self.shaping = Shaping.of(params, ends, limits.vocab_size, limits.never)
        if self.stop.strings and self.shaping is not None and self.shaping.min_tokens:
            raise DataError("min_tokens goes with no stop strings; give stop token ids")
        if self.stop.strings and tokenizer is None:
            raise DataError("stop strings need a tokenizer, and this base model has none; give stop token ids")
        self.want_prompt_logprobs = prompt_logprobs
        self.topk_prompt, self.topk_sample = topk_prompt, topk_sample
        self.prompt_last_n = _checked_last_n(prompt_last_n, len(self.prompt), prompt_logprobs)
        self.on_tokens = on_tokens
        self.constraint = constraint
        self.prompt_logprobs: np.ndarray | None = None
        self.prompt_topk: TopkLogprobs | None = None
        self.cache_hit_tokens: int | None = None
        seed = secrets.randbits(64) if params.seed is None else params.seed
        self.prompt_scores: PromptScores | None = None
        if prompt_targets is not None or prompt_draws != 0:
            asked = (prompt_targets, prompt_draws, self.temperature, seed, limits.never)
            self.prompt_scores = PromptScores(len(self.prompt), limits.vocab_size, *asked)
        keys = stream_keys(seed, num_samples)
        self.sequences = [SampleSequence(self, i, key, self._matcher(tokenizer)) for i, key in enumerate(keys.tolist())]
        self.unfinished = num_samples

    @property
    def masks(self) -> bool:
        """Whether tokens are ruled out: by a grammar, ``min_tokens`` or a ban."""
        return self.constraint is not None or (self.shaping is not None and self.shaping.masks)

    @property
    def needs_scoring(self) -> bool:
        """True while requested prompt logprobs are missing."""
        wanted = self.want_prompt_logprobs or self.topk_prompt > 0 or self.prompt_scores is not None
        return wanted and self.prompt_logprobs is None

    def score(self, logprobs: np.ndarray, topk_ids: np.ndarray | None, topk_logprobs: np.ndarray | None) -> None:
        """Set the prompt's logprobs: float32 (P,), NaN at 0; and the k likeliest tokens there, (P, >= k) each."""
        unwanted = 0 if self.prompt_last_n is None else len(self.prompt) - self.prompt_last_n
        self.prompt_logprobs = logprobs.copy()
        self.prompt_logprobs[:unwanted] = np.nan
        if self.topk_prompt and topk_ids is not None and topk_logprobs is not None:
            k = self.topk_prompt
            self.prompt_topk = TopkLogprobs(topk_ids[:, :k].copy(), topk_logprobs[:, :k].copy())
            self.prompt_topk.token_ids[:unwanted] = 0
            self.prompt_topk.logprobs[:unwanted] = MASK_LOGPROB

    @property
    def dead(self) -> bool:
        """True once the request was answered, failed or cancelled: no more work for it."""
        return self.future.done()

    def complete(self, policy_version: int) -> None:
        """Answer the request with what its sequences have become."""
        if self._settle():
            self.future.set_result(self._result(policy_version))

    def answer(self, result: SampleResult | list[float | None]) -> None:
        """Answer the request with what was sampled elsewhere."""
        if self._settle():
            self.future.set_result(result)

    def fail(self, error: Exception) -> None:
        """End the request with an error, if it has not ended."""
        if self._settle():
            self.future.set_exception(error)

    def _settle(self) -> bool:
        """True if the future still waits for an outcome. Tells waiters of a cancelled one, once."""
        if self._settled:
            return False
        self._settled = True
        return self.future.set_running_or_notify_cancel()

    def acknowledge_cancel(self) -> None:
        """Tell those who wait for a cancelled future that it has ended."""
        if self.future.cancelled():
            self._settle()

    def _result(self, policy_version: int) -> SampleResult | list[float | None]:
        """Tinker's form of the finished request; for a request without samples, the prompt's logprobs as a list."""
        if not self.sequences:
            assert self.prompt_logprobs is not None
            return [None if math.isnan(value) else value for value in self.prompt_logprobs.tolist()]
        return SampleResult(
            sequences=[sequence.result() for sequence in self.sequences],
            prompt_logprobs_np=self.prompt_logprobs if self.want_prompt_logprobs else None,
            topk_prompt_logprobs_np=self.prompt_topk,
            prompt_cache_hit_tokens=self.cache_hit_tokens or 0,
            **(self.prompt_scores.fields() if self.prompt_scores is not None else {}),
            policy_version=policy_version,
        )

    def _matcher(self, tokenizer: Any) -> StopTextMatcher | None:
        return StopTextMatcher(tokenizer, self.stop.strings, self.prompt) if self.stop.strings else None


def _checked_prompt(
    prompt: types.ModelInput | Sequence[int], limits: Limits
) -> tuple[list[int], tuple[PlacedImage, ...]]:
    images: tuple[PlacedImage, ...] = ()
    if isinstance(prompt, types.ModelInput):
        text_only = "only text (EncodedTextChunk) can be sampled from"
        tokens, images = read_model_input(prompt.chunks, limits.vision, "the prompt", text_only)
    else:
        tokens = _plain_ids(prompt)
    if not tokens:
        raise DataError("the prompt is empty; give at least one token (for instance the BOS token)")
    if min(tokens) < 0 or max(tokens) >= limits.vocab_size:
        at = next(i for i, token in enumerate(tokens) if not 0 <= token < limits.vocab_size)
        raise DataError(
            f"prompt token {tokens[at]} at position {at} is outside the vocabulary of {limits.vocab_size} tokens; "
            "was the prompt made with another model's tokenizer?"
        )
    return tokens, images


def _plain_ids(prompt: Any) -> list[int]:
    try:
        return [operator.index(token) for token in prompt]
    except TypeError as exc:
        raise DataError(
            f"the prompt is a {type(prompt).__name__}; give a tinker.ModelInput, or a list of token ids"
        ) from exc


def _checked_last_n(last_n: int | None, prompt_tokens: int, prompt_logprobs: bool) -> int | None:
    if last_n is None:
        return None
    if not prompt_logprobs:
        raise DataError("prompt_logprobs_last_n is about prompt logprobs; set include_prompt_logprobs")
    if not 1 <= last_n <= prompt_tokens - 1:
        raise DataError(f"prompt_logprobs_last_n must lie between 1 and {prompt_tokens - 1} here, got {last_n}")
    return last_n


def _check_params(
    p: types.SamplingParams, num_samples: int, limits: Limits, topk_prompt: int, topk_sample: int
) -> None:
    problems = {
        f"num_samples must be a whole number that is not negative, got {num_samples}": (
            not hasattr(num_samples, "__index__") or num_samples < 0
        ),
        f"temperature must be 0 (greedy) or a positive number, got {p.temperature}": not (
            math.isfinite(p.temperature) and p.temperature >= 0
        ),
        f"temperature {p.temperature} is too small to divide logits by; give 0 for greedy or at least {_COLDEST:g}": (
            0 < p.temperature < _COLDEST
        ),
        f"top_p must lie between 0 and 1, got {p.top_p}": not 0 <= p.top_p <= 1,
        f"top_k must be -1 or 0 (off) or positive, got {p.top_k}": p.top_k < -1,
        f"max_tokens must be positive or None, got {p.max_tokens}": p.max_tokens is not None and p.max_tokens < 1,
    }
    for name, k in (("topk_prompt_logprobs", topk_prompt), ("topk_sample_logprobs", topk_sample)):
        problems[f"{name} must lie between 0 and the vocabulary's {limits.vocab_size}, got {k}"] = (
            not 0 <= k <= limits.vocab_size
        )
    for message, wrong in problems.items():
        if wrong:
            raise DataError(message)


def _room(prompt_tokens: int, num_samples: int, max_tokens: int | None, context_length: int) -> int:
    """Tokens that may be sampled: ``max_tokens``, or less if the context ends first."""
    room = context_length - prompt_tokens
    if room < (1 if num_samples else 0):
        raise PromptTooLongError(prompt_tokens, max_tokens or (1 if num_samples else 0), context_length)
    return room if max_tokens is None else min(room, max_tokens)


def _text_decoder(tokenizer: Any) -> Callable[[list[int]], str] | None:
    if tokenizer is None:
        return None
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
