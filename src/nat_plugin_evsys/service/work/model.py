"""One model of a client: its waiting operations, its weights while in memory, and how it is restored."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING

from nat_plugin_evsys.engine.gradient.trainable import TrainableModel
from nat_plugin_evsys.errors import EvsysError, OperationAbandoned, RestoreError
from nat_plugin_evsys.runtime.bases import SharedBase
from nat_plugin_evsys.service.store.operations import Effect, Operation, Outcome
from nat_plugin_evsys.service.wire.kinds import OperationKind
from nat_plugin_evsys.service.work.failures import error_of
from nat_plugin_evsys.service.work.lost_gradient import LostGradient, loses_gradient
from nat_plugin_evsys.service.work.ordering import SequenceBuffer
from nat_plugin_evsys.service.work.restoring import restore
from nat_plugin_evsys.service.work.states import SavedStates, StatePolicy

if TYPE_CHECKING:
    from nat_plugin_evsys.service.store.rows import ModelRow
    from nat_plugin_evsys.service.store.store import Store

logger = logging.getLogger(__name__)


class HostedModel:
    """A model that operations can be run on, in memory or parked.

    ``buffer``, ``used``, ``turn``, ``held_bytes``, ``busy``, ``park_wanted`` and ``gone`` belong to the lock of its
    ``TrainingThread``; the rest is that thread's own.

    Attributes:
        shared: its base model.
        used: engine seconds, as the turns count them.
        turn: number of its last turn on the thread.
        held_bytes: memory that it took after that turn.
        busy: the thread runs something for it now.
        park_wanted: unload once nothing is left to do.
        gone: it was never created, or has been forgotten; accepts no more operations.
        model: its weights, moments and gradient; None while parked.
        lost: set while the accumulated gradient lacks a part.
        engine_seconds: spent on it since the server started.
        tokens_trained: tokens of its forward_backward calls since then.
        step: optimizer steps that made its weights, where known.
    """

    def __init__(
        self,
        model_id: str,
        shared: SharedBase,
        next_seq: int,
        store: Store,
        states: SavedStates,
        *,
        policy: StatePolicy,
        retain_operations: bool,
    ) -> None:
        self.model_id = model_id
        self.shared = shared
        self.buffer = SequenceBuffer(next_seq)
        self.used = 0.0
        self.turn = 0
        self.held_bytes = 0
        self.busy = False
        self.park_wanted = False
        self.gone = False
        self.model: TrainableModel | None = None
        self.lost: LostGradient | None = None
        self.engine_seconds = 0.0
        self.tokens_trained = 0
        self.step: int | None = None
        self._store = store
        self._states = states
        self._policy = policy
        self._retain = retain_operations
        # The last operation after which no gradient was pending: what a state saved now would cover.
        self._settled_seq = next_seq - 1
        self._changed = False
        self._seconds_since_saved = 0.0
        self._saving_took = 0.0

    def row(self) -> ModelRow:
        """Its row in the store.

        Raises:
            RestoreError: there is none, because its session was forgotten.
        """
        row = self._store.model(self.model_id)
        if row is None:
            raise RestoreError(f"there is no model {self.model_id}; its session may have expired")
        return row

    def loaded(self, stop: threading.Event) -> TrainableModel:
        """The model; from its last saved state and the operations since, if it is not in memory.

        Raises:
            RestoreError: that is not possible.
            OperationAbandoned: ``stop`` was set meanwhile.
        """
        if self.model is None:
            try:
                self._restore(stop)
            except OperationAbandoned:
                raise
            except (EvsysError, OSError) as exc:
                logger.exception("model %s cannot be restored", self.model_id)
                raise RestoreError(f"the state of model {self.model_id} could not be restored: {exc}") from exc
        assert self.model is not None
        return self.model

    @property
    def has_gradient(self) -> bool:
        """Whether one is pending in memory."""
        return self.model is not None and self.model.gradient is not None

    def evict(self) -> None:
        """Drop weights that may differ from what the journal says."""
        self.model = None

    def adopt(self, model: TrainableModel) -> None:
        """Take over a newly created model."""
        self.model = model
        self.step = model.step

    def ended(self, operation: Operation, outcome: Outcome, seconds: float) -> None:
        """Record what an operation with a stored outcome did, and save the state if that is due."""
        self.engine_seconds += seconds
        self._seconds_since_saved += seconds
        if outcome.effect != Effect.NONE and operation.kind != OperationKind.FORWARD_BACKWARD:
            self.lost = None
            self._changed |= outcome.effect == Effect.APPLIED
        elif outcome.failed and loses_gradient(operation):
            self.lost = LostGradient(operation.seq_id, error_of(outcome), time.time())
        self._settle(operation.seq_id)
        if self.model is None:
            return
        self.step = self.model.step
        if operation.kind == OperationKind.LOAD_WEIGHTS and outcome.effect == Effect.APPLIED:
            # The load itself wrote this state, so that a replay does not depend on the checkpoint's being there still.
            self._changed = True
            self._cover(str(operation.seq_id), operation.seq_id)
        elif self._changed and self._policy.due(self._seconds_since_saved, self._saving_took):
            self.save_state()

    def save_state(self) -> None:
        """Write the weights as of the last moment without a pending gradient, unless nothing has changed."""
        if self.model is None or not self._changed:
            return
        self._seconds_since_saved = 0.0  # also if it fails: tried again when it is due again
        try:
            name, self._saving_took = self._states.write(self.model_id, self._settled_seq, self.model)
        except EvsysError as exc:
            # Without it a restart has more to run again; nothing is lost.
            logger.error("the state of model %s was not saved: %s", self.model_id, exc)
            return
        self._cover(name, self._settled_seq)

    def park(self) -> None:
        """Save what is needed to restore it, and unload it."""
        self.save_state()
        self.model = None

    def _cover(self, name: str, seq: int) -> None:
        """Make restarts begin at the state ``name`` from now on."""
        self._seconds_since_saved = 0.0
        try:
            self._store.set_saved_state(self.model_id, name, seq, retain=self._retain).result()
        except EvsysError as exc:
            logger.error("the saved state of model %s was not used: %s", self.model_id, exc)
            return
        self._states.keep_only(self.model_id, name)
        self._changed = False

    def _settle(self, seq: int) -> None:
        if self.model is not None and self.model.gradient is None and self.lost is None:
            self._settled_seq = seq

    def _restore(self, stop: threading.Event) -> None:
        started = time.perf_counter()
        row = self.row()
        restored = restore(self._store, self._states, self.shared, row, stop)
        self.lost, self._settled_seq, self._changed = restored.lost, restored.settled_seq, restored.changed
        self.adopt(restored.model)
        self._settle(row.next_seq - 1)
        seconds = time.perf_counter() - started
        logger.info("model %s restored: %d operations replayed in %.2f s", self.model_id, restored.replayed, seconds)
