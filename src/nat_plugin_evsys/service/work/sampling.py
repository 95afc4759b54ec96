"""Runs ``asample`` operations: hands them to the sampler of their base model and stores what comes back."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from nat_plugin_evsys.errors import CheckpointError, EngineClosedError
from nat_plugin_evsys.runtime.arguments import refuse_options
from nat_plugin_evsys.service.store.operations import PROTOBUF, Operation, Outcome
from nat_plugin_evsys.service.wire.requests import Sample
from nat_plugin_evsys.service.wire.results import encode_sample
from nat_plugin_evsys.service.work.ending import end
from nat_plugin_evsys.service.work.failures import failure, failure_of
from nat_plugin_evsys.service.work.samplers import Samplers
from nat_plugin_evsys.service.work.throughput import Throughput

if TYPE_CHECKING:
    from nat_plugin_evsys.service.store.store import Store

logger = logging.getLogger(__name__)

_THREADS = 4


class SampleRunner:
    """Takes ``asample`` operations; ``submit`` never blocks.

    Args:
        closing: set when the engine closes: no more operations are accepted, and running ones stay unfinished.

    Attributes:
        throughput: tokens sampled.
    """

    def __init__(self, store: Store, samplers: Samplers, closing: threading.Event) -> None:
        self.throughput = Throughput()
        self._store = store
        self._samplers = samplers
        self._closing = closing
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="evsys-asample")
        self._lock = threading.Condition()
        self._running: dict[str, tuple[int, Future[Any] | None]] = {}
        self._cancelled: set[str] = set()

    def submit(self, operation: Operation) -> None:
        """Queue an operation; it stays unfinished in the store once the engine closes."""
        with self._lock:
            if self._closing.is_set() or operation.request_id in self._running:
                return
            self._running[operation.request_id] = (0, None)
        self._hand_over(operation, self._start, operation)

    def cancel(self, request_id: str) -> None:
        """Stop a request that has not ended."""
        with self._lock:
            if request_id not in self._running:
                return
            self._cancelled.add(request_id)
            future = self._running[request_id][1]
        if future is not None:
            future.cancel()

    def active(self) -> tuple[int, int]:
        """Requests, and sequences of them, that have not ended."""
        with self._lock:
            return len(self._running), sum(sequences for sequences, _ in self._running.values())

    def close(self, timeout: float) -> None:
        """Wait for running requests; those that do not end in time stay unfinished."""
        with self._lock:
            self._lock.wait_for(lambda: not self._running, timeout)

    def shutdown(self) -> None:
        """End the threads; after the samplers have been closed."""
        self._pool.shutdown(wait=True)

    def _start(self, operation: Operation) -> None:
        try:
            body = operation.request
            assert isinstance(body, Sample)
            future = self._sample(operation, body)
        except Exception as exc:  # noqa: BLE001 - boundary: whatever is wrong belongs to the operation's future
            if isinstance(exc, EngineClosedError) and self._closing.is_set():
                self._forget(operation)
            else:
                self._finish(operation, failure_of(operation, exc))
            return
        with self._lock:
            self._running[operation.request_id] = (body.num_samples, future)
            cancelled = operation.request_id in self._cancelled
        if cancelled:
            future.cancel()
        future.add_done_callback(lambda _: self._ended(operation, future))

    def _sample(self, operation: Operation, body: Sample) -> Future[Any]:
        refuse_options(record_stability_info=body.record_stability_info)
        row = self._store.sampler(operation.scope)
        if row is None or row.owner != operation.owner:
            raise CheckpointError(f"there is no sampling session {operation.scope}; its session may have expired")
        return self._samplers.open(row).sample(
            body.prompt.model_input(),
            body.num_samples,
            body.sampling_params.params(),
            bool(body.prompt_logprobs),
            body.topk_prompt_logprobs,
            topk_sample_logprobs=body.topk_sample_logprobs,
            prompt_logprobs_last_n=body.prompt_logprobs_last_n,
            target_prompt_logprobs=body.targets(),
            prompt_alt_tokens_k=body.prompt_alt_tokens_k,
        )

    def _ended(self, operation: Operation, future: Future[Any]) -> None:
        # Called in the sampler's thread, which must go on decoding.
        self._hand_over(operation, self._store_result, operation, future)

    def _hand_over(self, operation: Operation, work: Callable[..., None], *args: Any) -> None:
        try:
            self._pool.submit(work, *args)
        except RuntimeError:  # closed at this very moment: the operation stays unfinished in the store
            self._forget(operation)

    def _store_result(self, operation: Operation, future: Future[Any]) -> None:
        try:
            result = future.result()
            outcome = Outcome(encode_sample(result), PROTOBUF)
            self.throughput.add(sum(len(sequence.tokens_np) for sequence in result.sequences))
        except CancelledError:
            outcome = failure("the request was cancelled by its client")
        except Exception as exc:  # noqa: BLE001 - boundary: whatever the sampler raised belongs to the future
            if isinstance(exc, EngineClosedError) and self._closing.is_set():
                self._forget(operation)
                return
            outcome = failure_of(operation, exc)
        self._finish(operation, outcome)

    def _finish(self, operation: Operation, outcome: Outcome) -> None:
        try:
            end(self._store, operation, outcome, self._closing)
        finally:
            self._forget(operation)

    def _forget(self, operation: Operation) -> None:
        with self._lock:
            self._running.pop(operation.request_id, None)
            self._cancelled.discard(operation.request_id)
            self._lock.notify_all()
