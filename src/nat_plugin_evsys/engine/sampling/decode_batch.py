"""The sequences that one policy decodes together, and the decode steps."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from nat_plugin_evsys.engine.sampling.budgets import KVBudget
from nat_plugin_evsys.engine.sampling.decoding import RowParams
from nat_plugin_evsys.engine.sampling.exact_runner import ExactRunner
from nat_plugin_evsys.engine.sampling.kv_cache import SlotStore, rounded_length
from nat_plugin_evsys.engine.sampling.model_runner import ModelRunner
from nat_plugin_evsys.engine.sampling.policies import SamplingPolicy
from nat_plugin_evsys.engine.sampling.request import SampleRequest, SampleSequence, TokenCallback
from nat_plugin_evsys.engine.sampling.row_decoder import Context, RowDecoder
from nat_plugin_evsys.engine.sampling.row_sampler import row_params, sample_rows
from nat_plugin_evsys.errors import EvsysError, ModelError
from nat_plugin_evsys.garbage import empty_frames


class DecodeBatch:
    """Continuous batching for one policy: row i of the decoder belongs to sequence i.

    A step scores prompts, lets waiting sequences join (those that continue the same tokens do so together), and feeds
    one token of every row and what a pass takes of the joining contexts. Sequences leave as they end. If the rows
    outgrow the KV memory, the last ones go back to waiting; as the random numbers are counter-based, that changes
    nothing they sample.
    """

    def __init__(
        self,
        runner: ModelRunner | ExactRunner,
        policy: SamplingPolicy,
        decoder: RowDecoder,
        *,
        max_rows: int,
        kv: KVBudget,
        never: Tensor | None = None,
    ) -> None:
        self.policy = policy
        self.decoder = decoder
        self._runner = runner
        self._max_rows = max_rows
        self._kv = kv
        self._never = never
        self._rows: list[SampleSequence] = []
        self._joining: dict[Context, list[SampleSequence]] = {}
        self._waiting: deque[SampleSequence] = deque()
        self._to_score: deque[SampleRequest] = deque()
        self._params: RowParams | None = None
        self._at_stake: list[SampleRequest] = []

    @property
    def idle(self) -> bool:
        """True when nothing is being decoded or waits."""
        return not (self._rows or self._joining or self._waiting or self._to_score)

    def submit(self, request: SampleRequest) -> None:
        """Accept a request."""
        if request.needs_scoring:
            self._to_score.append(request)
        else:
            self._waiting.extend(request.sequences)

    def requests(self) -> list[SampleRequest]:
        """Every unfinished request."""
        return _requests([*self._in_decoder(), *self._waiting], self._to_score)

    def _in_decoder(self) -> list[SampleSequence]:
        return [*self._rows, *(s for sequences in self._joining.values() for s in sequences)]

    def step(self) -> None:
        """Score, admit, decode one token. A failure fails the requests that it was for."""
        tokens = self.begin()
        if tokens is not None:
            self.decode(tokens)

    def begin(self) -> list[int] | None:
        """All of a step before its pass: the rows' last tokens, or None if there is nothing to decode."""
        for stage in (self._retire, self._score, self._admit, self._preempt):
            self._at_stake = []
            self._guard(stage)
        self._at_stake = _requests(self._in_decoder())
        return [s.tokens[-1] for s in self._rows] if self._at_stake else None

    def decode(self, tokens: list[int]) -> None:
        """The pass, and what follows it, after ``begin``."""
        self.end(lambda: self.decoder.step(tokens))

    def end(self, step: Callable[[], tuple[Tensor, list[Context]]]) -> None:
        """What follows the pass, with what the decoder's ``step`` gives."""
        self._guard(lambda: self._take(*step()))

    def _guard(self, stage: Callable[[], None]) -> None:
        try:
            stage()
        except Exception as exc:  # noqa: BLE001 - boundary: whatever the model raises goes to the requests concerned
            self._fail(self._at_stake or self.requests(), exc)

    def _fail(self, requests: Iterable[SampleRequest], cause: Exception) -> None:
        empty_frames(cause)
        for request in requests:
            error = ModelError(
                f"sampling from policy version {self.policy.version} failed: {type(cause).__name__}: {cause}"
            )
            error.__cause__ = cause
            request.fail(error)

    # -- prompt logprobs

    def _score(self) -> None:
        """Prompt logprobs of some waiting requests, in one batch. Always from the whole prompt."""
        batch: list[SampleRequest] = []
        while self._to_score and self._fits(batch, self._to_score[0]):
            request = self._to_score.popleft()
            if request.dead:
                request.acknowledge_cancel()
            else:
                batch.append(request)
        if not batch:
            return
        self._at_stake = batch
        # A store of its own: one long prompt must not lengthen the slots of every row.
        store = SlotStore(self._runner.layout)
        store.reserve(len(batch), max(len(r.prompt) for r in batch))  # at once: growing copies, and holds it twice
        prompts, topk = [r.prompt for r in batch], max(r.topk_prompt for r in batch)
        watchers = [r.prompt_scores for r in batch]
        images = {"images": [r.images for r in batch]} if isinstance(self._runner, ExactRunner) else {}
        scores = self._runner.score(self.policy.adapter, store, prompts, topk, watchers, **images)
        for slot, (request, (logprobs, topk_ids, topk_logprobs)) in enumerate(zip(batch, scores, strict=True)):
            if np.isnan(logprobs[1:]).any():
                request.fail(self.policy.not_finite())
                continue
            request.score(logprobs, topk_ids, topk_logprobs)
            self.decoder.keep(request.prompt, store, slot)
            if request.sequences:
                self._waiting.extend(request.sequences)
            else:
                request.complete(self.policy.version)

    def _fits(self, batch: list[SampleRequest], request: SampleRequest) -> bool:
        if not batch:
            return True
        # Sequences that are decoded alone are scored alone, too: padding changes the last bits.
        longest, rows = max(len(r.prompt) for r in [*batch, request]), len(batch) + 1
        if self._max_rows == 1 or rows * longest > self._runner.prefill_tokens:
            return False
        return self._kv.takes(rows * rounded_length(longest) * self._runner.layout.bytes_per_token)

    # -- joining

    def _admit(self) -> None:
        """Hand as many waiting sequences to the decoder as there is room for."""
        contexts: dict[tuple[bytes, tuple[int, ...]], Context] = {}
        joining: dict[Context, list[SampleSequence]] = {}
        self._at_stake = _requests(self._waiting)
        rows = len(self._in_decoder())
        while self._waiting:
            sequence = self._waiting[0]
            if sequence.request.dead:
                sequence.request.acknowledge_cancel()
                self._waiting.popleft()
                continue
            key = (sequence.request.prompt_key, tuple(sequence.tokens))
            request = sequence.request
            context = contexts.get(key) or Context([*request.prompt, *sequence.tokens], 0, images=request.images)
            context.rows += 1
            context.most = max(context.most, request.max_tokens - len(sequence.tokens))
            new = {**contexts, key: context}
            if rows and (rows >= self._max_rows or not self.decoder.fits(list(new.values()))):
                context.rows -= 1
                break
            contexts = new
            joining.setdefault(context, []).append(sequence)
            rows += 1
            self._waiting.popleft()
        for context, sequences in joining.items():
            self.decoder.join(context)
            self._joining[context] = sequences

    # -- decoding

    def _take(self, logits: Tensor, read: list[Context]) -> None:
        """One token for every row, and the first one for those whose context has been read."""
        before = len(self._rows)
        # First of all, so that row i stays row i of the decoder, whatever fails.
        for context in read:
            sequences = self._joining.pop(context)
            self._rows += sequences
            for sequence in sequences:
                if sequence.request.cache_hit_tokens is None:
                    sequence.request.cache_hit_tokens = context.known
        if not self._rows:
            return
        if read:
            self._params = None
            counts = torch.tensor([1] * before + [context.rows for context in read])
            logits = logits.repeat_interleave(counts.to(logits.device), dim=0)
        if self._params is None:
            self._params = row_params(self._rows, self._runner.vocab_size, self._runner.device, self._never)
        self._accept(sample_rows(self._rows, logits, self._params))
        self._retire()

    def _preempt(self) -> None:
        while len(self._rows) > 1 and not self.decoder.fits(()):
            sequence = self._rows[-1]
            self._waiting.appendleft(sequence)
            self._remove(len(self._rows) - 1, _read_tokens(sequence))

    def _accept(self, sampled: list[tuple[int, float]]) -> None:
        """Hand each row its token."""
        for sequence, (token, logprob) in zip(self._rows, sampled, strict=True):
            request = sequence.request
            if request.dead:
                continue
            if not math.isfinite(logprob):
                request.fail(self.policy.not_finite())
                continue
            try:
                sequence.accept(token, logprob)
                if request.on_tokens is not None:
                    _call_back(request.on_tokens, sequence.index, token, logprob)
            except EvsysError as exc:
                request.fail(exc)
            except Exception as exc:  # noqa: BLE001 - boundary: the caller's tokenizer; goes to the request
                self._fail([request], exc)

    # -- leaving

    def _retire(self) -> None:
        """Take out what ended or whose request did; the last row moves into the gap."""
        for context, sequences in list(self._joining.items()):
            if all(s.request.dead for s in sequences):
                del self._joining[context]
                for sequence in sequences:
                    sequence.request.acknowledge_cancel()
                self.decoder.leave(context)
        for i in range(len(self._rows) - 1, -1, -1):
            sequence = self._rows[i]
            if sequence.request.dead:
                sequence.request.acknowledge_cancel()
                self._remove(i, None)
            elif sequence.stop_reason is not None:
                try:
                    self._remove(i, _read_tokens(sequence))
                finally:  # it is done, even if what it read cannot be kept
                    sequence.request.unfinished -= 1
                    if sequence.request.unfinished == 0:
                        sequence.request.complete(self.policy.version)

    def _remove(self, i: int, keep: list[int] | None) -> None:
        last = self._rows.pop()
        if i < len(self._rows):
            self._rows[i] = last
        self._params = None
        self.decoder.remove(i, keep)


def _requests(sequences: Iterable[SampleSequence], more: Iterable[SampleRequest] = ()) -> list[SampleRequest]:
    """The requests of sequences, and ``more``, each once."""
    return list({id(r): r for r in [*more, *(s.request for s in sequences)]}.values())


def _call_back(on_tokens: TokenCallback, index: int, token: int, logprob: float) -> None:
    """Tell the caller of a token.

    Raises:
        ModelError: its callback failed, with an error of its own.
    """
    try:
        on_tokens(index, [token], [logprob])
    except EvsysError:
        raise
    except Exception as exc:
        raise ModelError(f"the request's callback on_tokens failed: {type(exc).__name__}: {exc}") from exc


def _read_tokens(sequence: SampleSequence) -> list[int]:
    """What a row has computed: all but its last token, which was sampled but never fed."""
    return [*sequence.request.prompt, *sequence.tokens[:-1]]
