"""What a training thread does in a model's turn: run an operation, store its outcome, keep the model restorable."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from nat_plugin_evsys.errors import EvsysError, OperationAbandoned
from nat_plugin_evsys.service.store.operations import Operation, Outcome

if TYPE_CHECKING:
    from nat_plugin_evsys.service.store.store import Store

import time

from nat_plugin_evsys.service.store.operations import Effect, OperationKind
from nat_plugin_evsys.service.work.execution import Execution
from nat_plugin_evsys.service.work.failures import failure
from nat_plugin_evsys.service.work.model import HostedModel
from nat_plugin_evsys.service.work.throughput import Throughput

logger = logging.getLogger(__name__)

_RETRY_S = 2.0


class Journal:
    """The ends of operations. Safe to use from several threads.

    Args:
        store: where they are kept.
        on_finished: told each request's id once its outcome is stored.
    """

    def __init__(self, store: Store, on_finished: Callable[[str], None]) -> None:
        self.store = store
        self._on_finished = on_finished
        self._closing = threading.Event()

    def finish(self, operation: Operation, outcome: Outcome, next_seq: int | None = None) -> bool:
        """Store an outcome, waiting out a store that refuses (a full disk), then tell. False: the engine closed first.

        Of a request that the store no longer knows, nothing is kept.
        """
        while True:
            try:
                self.store.finish_operation(operation.request_id, outcome, next_seq=next_seq).result()
                break
            except EvsysError as exc:
                if self.store.outcome(operation.request_id) is None:
                    return True
                logger.error("the outcome of %s could not be stored, trying again: %s", operation.request_id, exc)
            if self._closing.wait(_RETRY_S):
                return False
        try:
            self._on_finished(operation.request_id)
        except Exception:  # boundary: a listener's fault is not the operation's
            logger.exception("on_finished(%r) failed", operation.request_id)
        return True

    def close(self) -> None:
        """Do not wait for the store any longer."""
        self._closing.set()


class TrainingWork:
    """``turns.Work``.

    Attributes:
        throughput: tokens trained on.
        seconds: engine seconds of all models.
    """

    def __init__(self, journal: Journal, execution: Execution, gap_timeout: float) -> None:
        self.throughput = Throughput()
        self.seconds = 0.0
        self._journal = journal
        self._execution = execution
        self._gap_timeout = gap_timeout

    def run(self, hosted: HostedModel, operation: Operation, stop: threading.Event) -> bool:
        """Run one operation to its stored outcome. False: it has not ended, as the engine closes."""
        started, tokens = time.perf_counter(), hosted.tokens_trained
        try:
            outcome = self._execution.run(hosted, operation, stop)
        except OperationAbandoned:
            return False
        seconds = time.perf_counter() - started
        self.seconds += seconds
        self.throughput.add(hosted.tokens_trained - tokens)
        if not self._journal.finish(operation, outcome, next_seq=operation.seq_id + 1):
            # Memory has what the store has not.
            hosted.evict()
            return False
        if operation.seq_id == 0 and outcome.failed:
            hosted.gone = True
            return True
        hosted.ended(operation, outcome, seconds)
        return True

    def give_up(self, hosted: HostedModel, operations: list[Operation], missing: int) -> None:
        """End operations that wait for ``missing``, which does not come."""
        message = (
            f"operation {missing} of model {hosted.model_id} has not come in {self._gap_timeout:g} s; it and the "
            "operations behind it are given up"
        )
        for operation in operations:
            clears = operation.kind == OperationKind.OPTIM_STEP
            if clears and hosted.model is not None:
                hosted.model.discard_gradient()
            outcome = failure(message, effect=Effect.CLEARED if clears else Effect.NONE)
            if not self._journal.finish(operation, outcome, next_seq=operation.seq_id + 1):
                hosted.evict()
                return
            hosted.ended(operation, outcome, 0.0)

    def refuse(self, hosted: HostedModel, operations: list[Operation]) -> None:
        """End operations of a model that is gone."""
        for operation in operations:
            self._journal.finish(operation, failure(f"there is no model {hosted.model_id}"))

    def park(self, hosted: HostedModel) -> None:
        """Take a model out of memory."""
        hosted.park()
