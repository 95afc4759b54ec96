"""Runs the operations of models, each to its stored outcome, and keeps the models restorable."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from nat_plugin_evsys.errors import CheckpointError, EvsysError, OperationAbandoned
from nat_plugin_evsys.service.store.operations import Effect, Operation, Outcome
from nat_plugin_evsys.service.wire.kinds import OperationKind
from nat_plugin_evsys.service.work.ending import end
from nat_plugin_evsys.service.work.failures import failure, failure_of
from nat_plugin_evsys.service.work.model import HostedModel
from nat_plugin_evsys.service.work.opening import create, load
from nat_plugin_evsys.service.work.places import Places
from nat_plugin_evsys.service.work.saving import save, save_for_sampler
from nat_plugin_evsys.service.work.stepping import forward_backward, optim_step
from nat_plugin_evsys.service.work.throughput import Throughput

logger = logging.getLogger(__name__)

Handler = Callable[[Places, HostedModel, Operation, threading.Event], Outcome]

_HANDLERS: dict[OperationKind, Handler] = {
    OperationKind.CREATE_MODEL: create,
    OperationKind.FORWARD_BACKWARD: forward_backward,
    OperationKind.OPTIM_STEP: optim_step,
    OperationKind.SAVE_WEIGHTS: save,
    OperationKind.SAVE_WEIGHTS_FOR_SAMPLER: save_for_sampler,
    OperationKind.SAVE_WEIGHTS_EXTERNAL: save,
    OperationKind.LOAD_WEIGHTS: load,
}

_CHANGES_WEIGHTS = (OperationKind.OPTIM_STEP, OperationKind.LOAD_WEIGHTS)


class Execution:
    """A model's turn on the training thread. Methods run in the thread of the model's base.

    Args:
        places: what operations read and write.
        closing: see ``end``.

    Attributes:
        throughput: tokens trained on.
        seconds: engine seconds of all models.
    """

    def __init__(self, places: Places, closing: threading.Event) -> None:
        self.throughput = Throughput()
        self.seconds = 0.0
        self._places = places
        self._closing = closing

    def run(self, hosted: HostedModel, operation: Operation, stop: threading.Event) -> bool:
        """Run one operation to its stored outcome. False if it has not ended because the engine closes.

        Args:
            stop: set to interrupt it.
        """
        started, tokens = time.perf_counter(), hosted.tokens_trained
        try:
            outcome = self._outcome(hosted, operation, stop)
        except OperationAbandoned:
            return False
        seconds = time.perf_counter() - started
        self.seconds += seconds
        self.throughput.add(hosted.tokens_trained - tokens)
        if not self._end(operation, outcome):
            hosted.evict()  # memory has what the store has not
            return False
        if operation.seq_id == 0 and outcome.failed:
            hosted.gone = True
            return True
        self._note(hosted, operation, outcome, seconds)
        return True

    def give_up(self, hosted: HostedModel, operations: list[Operation], why: str) -> None:
        """End operations that wait for a missing one."""
        for operation in operations:
            clears = operation.kind == OperationKind.OPTIM_STEP
            if clears and hosted.model is not None:
                hosted.model.discard_gradient()
            outcome = failure(why, effect=Effect.CLEARED if clears else Effect.NONE)
            if not self._end(operation, outcome):
                hosted.evict()
                return
            self._note(hosted, operation, outcome, 0.0)

    def refuse(self, operations: list[Operation], why: str) -> None:
        """End operations that cannot be run."""
        for operation in operations:
            end(self._places.store, operation, failure(why), self._closing)

    def _note(self, hosted: HostedModel, operation: Operation, outcome: Outcome, seconds: float) -> None:
        try:
            hosted.ended(operation, outcome, seconds)
        except Exception:  # boundary: the outcome is stored, and a fault after it must not run the operation again
            logger.exception("model %s will be reloaded from the store", hosted.model_id)
            hosted.evict()

    def _end(self, operation: Operation, outcome: Outcome) -> bool:
        return end(self._places.store, operation, outcome, self._closing, next_seq=operation.seq_id + 1)

    def _outcome(self, hosted: HostedModel, operation: Operation, stop: threading.Event) -> Outcome:
        """Errors of an operation become failures. After an unforeseen one the model is evicted, so that its
        state is again what the store says."""
        try:
            return _HANDLERS[operation.kind](self._places, hosted, operation, stop)
        except OperationAbandoned:
            raise
        except Exception as exc:  # noqa: BLE001 - boundary: whatever an operation raises belongs to its future
            shown = self._places.access.public(exc) if isinstance(exc, CheckpointError) else exc
            outcome = failure_of(operation, shown)
            if operation.kind in _CHANGES_WEIGHTS and not isinstance(exc, EvsysError):
                hosted.evict()
            return outcome
