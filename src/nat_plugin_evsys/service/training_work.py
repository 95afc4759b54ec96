"""What a training thread does in a model's turn: run an operation, store its outcome, keep the model restorable."""

from __future__ import annotations

import threading
import time

from nat_plugin_evsys.service.execution import Execution
from nat_plugin_evsys.service.failures import OperationAbandoned, failure
from nat_plugin_evsys.service.hosted_model import HostedModel
from nat_plugin_evsys.service.journal import Journal
from nat_plugin_evsys.service.operations import Effect, Operation, OperationKind
from nat_plugin_evsys.service.throughput import Throughput


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
