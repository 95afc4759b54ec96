"""The sampler: one thread that decodes every request of every policy version, and the clients that feed it."""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch

from nat_plugin_evsys.engine.model.loading import BaseModel
from nat_plugin_evsys.engine.model.lora import LoraAdapter
from nat_plugin_evsys.engine.model.vision import Vision
from nat_plugin_evsys.engine.sampling.budgets import KVBudget, kv_bytes, prefix_budget
from nat_plugin_evsys.engine.sampling.client import LocalSamplingClient
from nat_plugin_evsys.engine.sampling.decode_batch import DecodeBatch
from nat_plugin_evsys.engine.sampling.decoding_check import trusted_runner
from nat_plugin_evsys.engine.sampling.exact_prefixes import ExactPrefixes
from nat_plugin_evsys.engine.sampling.exact_runner import ExactDecoder, ExactRunner
from nat_plugin_evsys.engine.sampling.grammars import Grammars
from nat_plugin_evsys.engine.sampling.image_runner import image_runner
from nat_plugin_evsys.engine.sampling.kv_cache import SPARE_BYTES, SlotStore
from nat_plugin_evsys.engine.sampling.model_runner import ModelRunner
from nat_plugin_evsys.engine.sampling.policies import Policies, SamplingPolicy
from nat_plugin_evsys.engine.sampling.prefix_cache import PrefixCache
from nat_plugin_evsys.engine.sampling.request import Limits, SampleRequest
from nat_plugin_evsys.engine.sampling.row_decoder import RowDecoder
from nat_plugin_evsys.engine.sampling.slot_decoder import SlotDecoder
from nat_plugin_evsys.engine.sampling.stopping import eos_token_ids, ids_without_a_token
from nat_plugin_evsys.engine.spans.decoder import SpanDecoder
from nat_plugin_evsys.engine.spans.joint import JointDecoding
from nat_plugin_evsys.engine.spans.probe import rollout_model
from nat_plugin_evsys.engine.spans.rollout_model import RolloutModel
from nat_plugin_evsys.engine.spans.slots import RowSlots
from nat_plugin_evsys.engine.spans.tree import SpanTree
from nat_plugin_evsys.errors import DataError, EngineClosedError, ModelError
from nat_plugin_evsys.garbage import empty_frames

logger = logging.getLogger(__name__)

_PASS_TOKENS = 1024
_REST_SECONDS = 60.0

SamplerPath = Literal["auto", "plain"]


class Sampler:
    """Samples from many policy versions of one base model at once.

    Requests join and leave between decode steps. Versions are decoded jointly on the fast path, in turns on the
    others, one step each, so that a new version does not wait for an old one to finish, or vice versa; no sequence ever
    changes its version.

    Args:
        base: the frozen base model.
        max_batch_size: most sequences of one policy that are decoded together.
        prefix_cache_bytes: memory for prefixes kept between requests; 0 turns that off. None: 2 GiB, or a quarter of
            the memory that is free now if that is less.
        kv_cache_bytes: approximate memory for the sequences being decoded, of all policies: fewer are decoded together
            if they are long. None: half of the GPU memory that is free now, or 4 GiB on the CPU.
        path: ``"auto"`` is the fast path if the model can use it, ``"plain"`` the one it is tested against.

    Attributes:
        plain_because: why requests are decoded the plain way; empty on the fast path.

    Raises:
        ModelError: no way of decoding gives what a plain pass over the whole sequence gives.
        DataError: max_batch_size < 1.
    """

    def __init__(
        self,
        base: BaseModel,
        *,
        max_batch_size: int = 64,
        prefix_cache_bytes: int | None = None,
        kv_cache_bytes: int | None = None,
        path: SamplerPath = "auto",
    ) -> None:
        if max_batch_size < 1:
            raise DataError(f"max_batch_size must be at least 1, got {max_batch_size}")
        self.max_batch_size = max_batch_size
        # A copy: encoding with padding or truncation elsewhere changes a fast tokenizer while this thread decodes.
        self.tokenizer = copy.deepcopy(base.tokenizer)
        eos = eos_token_ids(base.model, base.tokenizer, base.vocab_size)
        never = ids_without_a_token(base.tokenizer, base.vocab_size, eos)
        if isinstance(base.vision, Vision):
            never.append(base.vision.token)  # it could not be read back beside an image
        self._never = torch.tensor(never, device=base.device) if never else None
        self.limits = Limits(base.context_length, base.vocab_size, eos, base.vision, tuple(never))
        self.grammars = None if base.tokenizer is None else Grammars(self.tokenizer, base.vocab_size, eos)
        self._runner, self.plain_because = trusted_runner(base)
        keep = prefix_cache_bytes if prefix_cache_bytes is not None else prefix_budget(base.device)
        if isinstance(base.vision, Vision):
            keep //= 2  # of text, and of sequences with images
        self._prefixes = PrefixCache(keep)
        self._spans = SpanTree(self._runner.layout, keep)
        self._fast: RolloutModel | None = None
        if path == "auto" and not self.plain_because:
            self._fast, self.plain_because = rollout_model(base, self._runner.layout)
        else:
            self.plain_because = self.plain_because or "it was asked for"
        self._joint = None if self._fast is None else JointDecoding(self._fast)
        self._slots = RowSlots(self._runner.layout)
        self._kv = KVBudget(kv_cache_bytes if kv_cache_bytes is not None else kv_bytes(base.device))
        self._base = base
        self._images: ExactRunner | None = None
        self._seen = ExactPrefixes(keep) if keep else None
        self._batches: dict[tuple[int, bool], DecodeBatch] = {}
        self._spare: SlotStore | None = None
        self._policies = Policies()
        self._resting: list[tuple[int, threading.Event]] = []
        self._inbox: list[tuple[SamplingPolicy, SampleRequest]] = []
        self._wake = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None

    def client(self, adapter: LoraAdapter | None, policy_version: int) -> LocalSamplingClient:
        """A client of one policy version. None is the bare base model.

        A trainable adapter is copied, so that the client's weights stay as they are now.
        """
        return LocalSamplingClient(self, self._policies.new(adapter, policy_version))

    @property
    def fed_tokens(self) -> int:
        """Tokens that the model has read so far, without those from the prefix cache."""
        return sum(runner.fed_tokens for runner in (self._runner, self._fast, self._images) if runner is not None)

    def rest(self, client: LocalSamplingClient) -> None:
        """Free the merged weights of a version that is not sampled from now; its next request makes them again.

        Returns once they are free, a decode step of other versions later at the most.
        """
        done = threading.Event()
        with self._wake:
            if self._thread is None or self._closed:
                return
            self._resting.append((client.policy_ident, done))
            self._wake.notify()
        done.wait(_REST_SECONDS)

    def submit(self, policy: SamplingPolicy, request: SampleRequest) -> None:
        """Queue a request; its future ends with the result, an error, or by being cancelled."""
        with self._wake:
            if not self._closed:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name="evsys-sampler", daemon=True)
                    self._thread.start()
                self._inbox.append((policy, request))
                self._wake.notify()
                return
        request.fail(_closed_error())

    def close(self) -> None:
        """Fail requests in flight with ``EngineClosedError``, end the thread and free the memory. Idempotent."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self._prefixes.clear()
        self._spans.clear()
        self._slots.clear()
        if self._seen is not None:
            self._seen.clear()
        if self._joint is not None:
            self._joint.clear()
        self._spare = None

    def _run(self) -> None:
        with torch.inference_mode():
            while self._take():
                self._step_all()
        for batch in self._batches.values():
            for request in batch.requests():
                request.fail(_closed_error())
        self._batches.clear()

    def _take(self) -> bool:
        """Wait for work and hand it to the batches. False once the sampler is closed."""
        with self._wake:
            self._wake.wait_for(lambda: self._inbox or self._batches or self._resting or self._closed)
            inbox, self._inbox = self._inbox, []
            resting, self._resting = self._resting, []
            closed = self._closed
        self._free(resting)
        for policy, request in inbox:
            if closed:
                request.fail(_closed_error())
            else:
                self._submit(policy, request)
        return not closed

    def _submit(self, policy: SamplingPolicy, request: SampleRequest) -> None:
        try:
            if not policy.is_finite:  # attention to a few keys may make plausible numbers of NaN
                raise policy.not_finite()
            if request.images and self._images is None:
                self._images = image_runner(self._base)
            self._batch(policy, bool(request.images)).submit(request)
        except ModelError as exc:
            request.fail(exc)
        except Exception as exc:  # noqa: BLE001 - boundary: a request without room must fail, not end the thread
            request.fail(_failed(exc))

    def _free(self, resting: list[tuple[int, threading.Event]]) -> None:
        """Free merged weights of resting policies, and all that is kept of those whose last client is gone."""
        gone = self._policies.gone()
        for ident in gone:
            self._spans.forget(ident)
            if self._seen is not None:
                self._seen.forget(ident)
            for is_long in (False, True):
                self._prefixes.forget((ident, is_long))  # as ``SlotDecoder`` names them
        if self._joint is not None:
            for ident in (*gone, *(ident for ident, _ in resting)):
                self._joint.forget(ident)
        for _, done in resting:
            done.set()

    def _step_all(self) -> None:
        # Not in the loop that waits for work: its variable would keep a policy that nobody samples from.
        together = [] if self._joint is None else self._joint.chosen(list(self._batches.values()))
        for batch in [each for each in self._batches.values() if each not in together]:
            self._step([batch], batch.step)
        if self._joint is not None and together:
            self._step(together, partial(self._joint.decode, together))
        if self._joint is not None and not any(batch in self._batches.values() for batch in together):
            self._joint.end()

    def _step(self, batches: list[DecodeBatch], step: Callable[[], None]) -> None:
        """A step of one batch, or a joint one of several."""
        try:
            step()
        except Exception as exc:  # boundary: a bug in the loop must fail requests, not end the thread
            logger.exception("the sampler's decode loop failed")
            for request in (request for batch in batches for request in batch.requests()):
                request.fail(_failed(exc))
            for batch in batches:
                self._end(batch)
            return
        for batch in batches:
            if batch.idle:
                self._end(batch)
                if isinstance(batch.decoder, SlotDecoder):
                    store = batch.decoder.store
                    self._spare = store if store.nbytes <= SPARE_BYTES else None

    def _end(self, batch: DecodeBatch) -> None:
        self._batches = {key: other for key, other in self._batches.items() if other is not batch}
        batch.decoder.close()
        self._kv.leave(batch.decoder)

    def _batch(self, policy: SamplingPolicy, sees: bool) -> DecodeBatch:
        """That of requests with images, or of the others."""
        batch = self._batches.get((policy.ident, sees))
        if batch is None:
            runner: ModelRunner | ExactRunner = self._runner
            if sees and self._images is not None:
                runner = self._images
                seen = None if self._seen is None else (self._seen, policy.ident)
                each = self._runner.layout.bytes_per_token
                decoder: RowDecoder = ExactDecoder(runner, policy.adapter, seen, kv=self._kv, bytes_per_token=each)
            else:
                decoder, self._spare = self._decoder(policy), None
            self._kv.join(decoder)
            batch = DecodeBatch(runner, policy, decoder, max_rows=self.max_batch_size, kv=self._kv, never=self._never)
            self._batches[policy.ident, sees] = batch
        return batch

    def _decoder(self, policy: SamplingPolicy) -> RowDecoder:
        layout = self._runner.layout
        if isinstance(self._runner, ExactRunner):
            return ExactDecoder(self._runner, policy.adapter)
        if self._fast is None or self._joint is None:
            return SlotDecoder(
                self._runner,
                self._prefixes,
                policy.ident,
                policy.adapter,
                kv=self._kv,
                store=self._spare or SlotStore(layout),
            )
        slots = self._slots if self._joint.takes(policy) else RowSlots(layout)
        return SpanDecoder(
            self._fast,
            self._spans,
            policy.ident,
            policy.adapter,
            pass_tokens=min(_PASS_TOKENS, self._runner.prefill_tokens),
            kv=self._kv,
            slots=slots,
        )


def _failed(cause: Exception) -> ModelError:
    empty_frames(cause)
    error = ModelError(f"the sampler failed: {type(cause).__name__}: {cause}")
    error.__cause__ = cause
    return error


def _closed_error() -> EngineClosedError:
    return EngineClosedError("the sampler has been closed and takes no more requests; create a new one")
