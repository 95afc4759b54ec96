"""The sequences that one policy is decoding together, and the steps that move them on."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nat_plugin_evsys.engine.decoding import RowParams, draw, penalised, sampled_logprobs, uniforms
from nat_plugin_evsys.engine.kv_cache import SlotStore, rounded_length
from nat_plugin_evsys.engine.lora import LoraAdapter
from nat_plugin_evsys.engine.model_runner import ModelRunner
from nat_plugin_evsys.engine.prefix_cache import PrefixCache
from nat_plugin_evsys.engine.sample_request import SampleRequest, SampleSequence
from nat_plugin_evsys.engine.sample_result import top_columns
from nat_plugin_evsys.errors import ModelError


@dataclass(frozen=True, eq=False)
class SamplingPolicy:
    """Frozen weights to sample from: ``ident`` is unique in a sampler, ``version`` is what results report."""

    ident: int
    version: int
    adapter: LoraAdapter | None


class DecodeBatch:
    """Continuous batching for one policy: slot i of the store belongs to row i.

    A step scores prompts, lets waiting sequences join (each distinct prompt is prefilled once), and decodes one token
    for every row. Sequences leave as they end. If the rows outgrow the KV memory, the last ones go back to waiting and
    are prefilled again later; as the random numbers are counter-based, that changes nothing they sample.
    """

    def __init__(
        self,
        runner: ModelRunner,
        policy: SamplingPolicy,
        prefixes: PrefixCache,
        *,
        max_rows: int,
        kv_bytes: int,
        store: SlotStore | None = None,
    ) -> None:
        self.policy = policy
        self.store = store or SlotStore(runner.layout)
        self._runner = runner
        self._prefixes = prefixes
        self._max_rows = max_rows
        self._kv_bytes = kv_bytes
        self._rows: list[SampleSequence] = []
        self._waiting: deque[SampleSequence] = deque()
        self._to_score: deque[SampleRequest] = deque()
        self._params: RowParams | None = None
        self._at_stake: list[SampleRequest] = []

    @property
    def idle(self) -> bool:
        """True when nothing is being decoded or waits."""
        return not (self._rows or self._waiting or self._to_score)

    def submit(self, request: SampleRequest) -> None:
        """Take a request on."""
        if request.needs_scoring:
            self._to_score.append(request)
        else:
            self._waiting.extend(request.sequences)

    def requests(self) -> list[SampleRequest]:
        """Every request that is not finished."""
        sequences = [*self._rows, *self._waiting]
        return list({id(r): r for r in [*self._to_score, *(s.request for s in sequences)]}.values())

    def step(self) -> None:
        """Score, admit, decode one token. What fails, fails the requests it was done for."""
        for stage in (self._retire, self._score, self._admit, self._decode):
            self._at_stake = []
            try:
                stage()
            except Exception as exc:  # noqa: BLE001 - boundary: whatever the model raises goes to the requests concerned
                self._fail(self._at_stake or self.requests(), exc)

    def _fail(self, requests: Iterable[SampleRequest], cause: Exception) -> None:
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
        prompts, topk = [r.prompt for r in batch], max(r.topk_prompt for r in batch)
        scores = self._runner.score(self.policy.adapter, store, prompts, topk)
        for slot, (request, (logprobs, topk_ids, topk_logprobs)) in enumerate(zip(batch, scores, strict=True)):
            if np.isnan(logprobs[1:]).any():
                request.fail(self._not_finite())
                continue
            request.score(logprobs, topk_ids, topk_logprobs)
            self._prefixes.add(self.policy.ident, request.prompt, store, slot)
            if request.sequences:
                self._waiting.extend(request.sequences)
            else:
                request.complete(self.policy.version)

    def _fits(self, batch: list[SampleRequest], request: SampleRequest) -> bool:
        longest = max(len(r.prompt) for r in [*batch, request])
        return not batch or (len(batch) + 1) * longest <= self._runner.prefill_tokens

    # -- joining

    def _admit(self) -> None:
        """Let waiting sequences join: prefill their prompts and sample the first token of each."""
        picked = self._pick()
        if not picked:
            return
        self._at_stake = list({id(s.request): s.request for s in picked}.values())
        jobs = _by_context(picked)
        first = len(self._rows)
        self.store.reserve(first + len(picked), max(s.length for s in picked))
        contexts = [[*job[0].request.prompt, *job[0].tokens] for job in jobs]
        starts = [
            self._prefixes.load(self.policy.ident, context, self.store, first + i) for i, context in enumerate(contexts)
        ]
        logits = self._runner.prefill(self.policy.adapter, self.store, first, contexts, starts)
        order, sources = self._spread(jobs, contexts, first)
        params = self._build_params(order)
        self._sample(order, logits[torch.tensor(sources, device=logits.device)], params)
        for i, (job, context, start) in enumerate(zip(jobs, contexts, starts, strict=True)):
            if not job[0].request.dead:
                self._prefixes.add(self.policy.ident, context, self.store, first + i)
            for sequence in job:
                if sequence.request.cache_hit_tokens is None:
                    sequence.request.cache_hit_tokens = start
        self._rows.extend(order)
        self._params = None
        self._retire()

    def _pick(self) -> list[SampleSequence]:
        picked: list[SampleSequence] = []
        longest = max((s.length for s in self._rows), default=0)
        while self._waiting:
            sequence = self._waiting[0]
            if not sequence.request.dead:
                longest = max(longest, sequence.length + 1)
                if len(self._rows) + len(picked) + 1 > self._row_limit(longest):
                    break
                picked.append(sequence)
            else:
                sequence.request.acknowledge_cancel()
            self._waiting.popleft()
        return picked

    def _spread(
        self, jobs: list[list[SampleSequence]], contexts: list[list[int]], first: int
    ) -> tuple[list[SampleSequence], list[int]]:
        """Copy each prefilled slot for the job's other sequences. Returns the new rows and the job of each."""
        order = [job[0] for job in jobs]
        sources = list(range(len(jobs)))
        for i, job in enumerate(jobs):
            for sequence in job[1:]:
                self.store.copy(first + i, first + len(order), len(contexts[i]))
                order.append(sequence)
                sources.append(i)
        return order, sources

    def _row_limit(self, length: int) -> int:
        """Rows of ``length`` tokens that may be decoded together."""
        per_row = self._runner.layout.bytes_per_token * max(self.store.length, rounded_length(length))
        return max(1, min(self._max_rows, self._kv_bytes // per_row))

    # -- decoding

    def _decode(self) -> None:
        """One token for every row."""
        if not self._rows:
            return
        longest = max(s.length for s in self._rows)
        self._preempt(longest)
        self._at_stake = list({id(s.request): s.request for s in self._rows}.values())
        logits = self._runner.decode(
            self.policy.adapter, self.store, [s.tokens[-1] for s in self._rows], [s.length - 1 for s in self._rows]
        )
        if self._params is None:
            self._params = self._build_params(self._rows)
        self._sample(self._rows, logits, self._params)
        self._retire()

    def _preempt(self, longest: int) -> None:
        limit = self._row_limit(longest)
        while len(self._rows) > limit:
            sequence = self._rows.pop()
            self._keep_prefix(sequence, len(self._rows))
            self._waiting.appendleft(sequence)
            self._params = None

    def _build_params(self, rows: list[SampleSequence]) -> RowParams:
        wanted = [(s.request.temperature, s.request.top_k, s.request.top_p) for s in rows]
        return RowParams.build(wanted, self._runner.vocab_size, self._runner.device)

    def _sample(self, rows: list[SampleSequence], logits: Tensor, params: RowParams) -> None:
        """Sample one token a row from ``logits`` (B, V) and hand it to its sequence."""
        penalties = [
            (i, [*s.request.prompt, *s.tokens], s.request.repetition_penalty)
            for i, s in enumerate(rows)
            if s.request.repetition_penalty != 1.0
        ]
        if penalties:
            logits = penalised(logits, penalties)
        logprobs = sampled_logprobs(logits, params)
        keys = np.array([s.key for s in rows], dtype=np.uint64)
        counters = np.array([len(s.tokens) for s in rows], dtype=np.uint64)
        ids = draw(logprobs, params, uniforms(keys, counters))
        chosen = logprobs.gather(1, ids.unsqueeze(1)).squeeze(1).tolist()
        self._record_topk(rows, logprobs)
        for sequence, token, logprob in zip(rows, ids.tolist(), chosen, strict=True):
            request = sequence.request
            if request.dead:
                continue
            if not math.isfinite(logprob):
                request.fail(self._not_finite())
                continue
            try:
                sequence.accept(token, logprob)
                if request.on_tokens is not None:
                    request.on_tokens(sequence.index, [token], [logprob])
            except Exception as exc:  # noqa: BLE001 - boundary: the caller's callback and tokenizer; goes to the request
                self._fail([request], exc)

    def _record_topk(self, rows: list[SampleSequence], logprobs: Tensor) -> None:
        wanting = [i for i, s in enumerate(rows) if s.request.topk_sample]
        if not wanting:
            return
        most = max(rows[i].request.topk_sample for i in wanting)
        ids, values = top_columns(logprobs[torch.tensor(wanting, device=logprobs.device)], most)
        for i, row_ids, row_values in zip(wanting, ids, values, strict=True):
            k = rows[i].request.topk_sample
            rows[i].topk_ids.append(row_ids[:k])
            rows[i].topk_logprobs.append(row_values[:k])

    # -- leaving

    def _retire(self) -> None:
        """Take out rows that ended or whose request did; the last row moves into the gap."""
        for i in range(len(self._rows) - 1, -1, -1):
            sequence = self._rows[i]
            if sequence.request.dead:
                sequence.request.acknowledge_cancel()
                # A failed row may hold NaN, which would reach the slot's next owner through its masked columns.
                self.store.wipe(i)
            elif sequence.stop_reason is not None:
                self._keep_prefix(sequence, i)
                sequence.request.unfinished -= 1
                if sequence.request.unfinished == 0:
                    sequence.request.complete(self.policy.version)
            else:
                continue
            self._remove(i)

    def _remove(self, i: int) -> None:
        last = self._rows.pop()
        if i < len(self._rows):
            self.store.copy(len(self._rows), i, last.length)
            self._rows[i] = last
        self._params = None

    def _keep_prefix(self, sequence: SampleSequence, slot: int) -> None:
        """Keep what a row has computed: all but its last token, which was sampled but never fed."""
        tokens = [*sequence.request.prompt, *sequence.tokens[:-1]]
        self._prefixes.add(self.policy.ident, tokens, self.store, slot)

    def _not_finite(self) -> ModelError:
        return ModelError(
            f"policy version {self.policy.version} gives logits that are not finite; its weights are broken: "
            "go back to an earlier checkpoint, or lower the learning rate"
        )


def _by_context(sequences: list[SampleSequence]) -> list[list[SampleSequence]]:
    """Sequences that go on from the same tokens, together; shortest context first, so that padding stays small."""
    jobs: dict[tuple[bytes, tuple[int, ...]], list[SampleSequence]] = {}
    for sequence in sequences:
        jobs.setdefault((sequence.request.prompt_key, tuple(sequence.tokens)), []).append(sequence)
    return sorted(jobs.values(), key=lambda job: job[0].length)
