"""The models that have operations, and the training threads they run on."""

from __future__ import annotations

import threading
import time

from nat_plugin_evsys.engine.machine.memory import free_bytes
from nat_plugin_evsys.runtime.bases import SharedBase
from nat_plugin_evsys.service.store.operations import Operation
from nat_plugin_evsys.service.wire.requests import CreateModel, LoadWeights
from nat_plugin_evsys.service.work.ending import end
from nat_plugin_evsys.service.work.execution import Execution
from nat_plugin_evsys.service.work.failures import failure, failure_of
from nat_plugin_evsys.service.work.model import HostedModel
from nat_plugin_evsys.service.work.places import Places
from nat_plugin_evsys.service.work.served_bases import ServedBases
from nat_plugin_evsys.service.work.states import StatePolicy
from nat_plugin_evsys.service.work.turns import TrainingThread


class Hosting:
    """Dispatches training operations to models. Thread-safe, except that only one thread may call ``take``.

    Args:
        closing: set when the engine closes.
        gap_timeout: seconds after which operations waiting for a missing one are abandoned.
        policy: when the states of models are saved.
        retain_operations: keep the payloads of operations that a saved state covers.
        model_bytes: memory of all models together, shared equally by the bases; None is half of what is free on a
            base's device once the bases are loaded.
    """

    def __init__(
        self,
        places: Places,
        bases: ServedBases,
        closing: threading.Event,
        *,
        gap_timeout: float,
        policy: StatePolicy,
        retain_operations: bool,
        model_bytes: int | None,
    ) -> None:
        self.execution = Execution(places, closing)
        self._places = places
        self._bases = bases
        self._closing = closing
        self._gap_timeout = gap_timeout
        self._policy = policy
        self._retain = retain_operations
        self._model_bytes = model_bytes
        self._threads: dict[str, TrainingThread] = {}
        self._lock = threading.Lock()
        self._models: dict[str, HostedModel] = {}

    def start(self, bases: list[SharedBase]) -> None:
        """Start a thread for each base model."""
        for shared in bases:
            name = f"evsys-train-{len(self._threads)}"
            of_all = free_bytes(shared.base.device) // 2 if self._model_bytes is None else self._model_bytes
            share = of_all // len(bases)
            thread = TrainingThread(name, self.execution, self._gap_timeout, self._drop, memory_bytes=share)
            self._threads[shared.base.name] = thread
            thread.start()

    def take(self, operation: Operation) -> None:
        """Dispatch an operation to its model."""
        try:
            hosted = self._model_of(operation)
            if hosted is None:
                self._refuse(operation, f"there is no model {operation.scope}")
            elif not self._thread_of(hosted).add(hosted, operation):
                gone = f"there is no model {operation.scope}"
                late = (
                    f"operation {operation.seq_id} of model {operation.scope} came too late: operation "
                    f"{hosted.buffer.next_seq} is next, and this one was abandoned"
                )
                self._refuse(operation, gone if hosted.gone else late)
        except Exception as exc:  # noqa: BLE001 - boundary: whatever is wrong belongs to the operation's future
            end(self._places.store, operation, failure_of(operation, exc), self._closing)

    def park_session(self, session_id: str) -> None:
        """Unload a session's models once they have nothing left to run."""
        for hosted in self._of_session(session_id):
            self._thread_of(hosted).park(hosted)

    def forget_session(self, session_id: str) -> None:
        """Drop a session's models and their waiting operations."""
        for hosted in self._of_session(session_id):
            self._thread_of(hosted).forget(hosted)
            self._drop(hosted.model_id)

    def models(self) -> dict[str, HostedModel]:
        """The known models, in memory or parked, by id."""
        with self._lock:
            return dict(self._models)

    def queued(self, hosted: HostedModel) -> int:
        """Operations of a model that have arrived and not ended."""
        return self._thread_of(hosted).queued(hosted)

    def close(self, deadline: float) -> list[threading.Thread]:
        """Finish running operations, or stop them at ``deadline`` (``time.monotonic``), and park all models, in
        threads, which are returned running."""
        closing = [
            threading.Thread(target=thread.close, args=(max(0.0, deadline - time.monotonic()),))
            for thread in self._threads.values()
        ]
        for each in closing:
            each.start()
        return closing

    def _refuse(self, operation: Operation, why: str) -> None:
        end(self._places.store, operation, failure(why), self._closing)

    def _model_of(self, operation: Operation) -> HostedModel | None:
        with self._lock:
            hosted = self._models.get(operation.scope)
        if hosted is not None:
            return hosted
        row = self._places.store.model(operation.scope)
        if row is not None:
            if row.owner != operation.owner:
                return None
            return self._host(operation.scope, self._bases.get(row.base_model), row.next_seq)
        if operation.seq_id != 0:
            return None
        return self._host(operation.scope, self._base_asked_for(operation), 0)

    def _base_asked_for(self, operation: Operation) -> SharedBase:
        """The base model of a model to be created.

        Raises:
            EvsysError: the request is malformed, or names a base model or checkpoint that is not here.
        """
        request = operation.request
        assert isinstance(request, CreateModel | LoadWeights)
        if request.base_model is not None:
            return self._bases.get(request.base_model)
        assert isinstance(request, LoadWeights)
        return self._bases.of_checkpoint(self._places.access.read(request.path, operation.owner))

    def _host(self, model_id: str, shared: SharedBase, next_seq: int) -> HostedModel:
        places, policy, retain = self._places, self._policy, self._retain
        hosted = HostedModel(
            model_id, shared, next_seq, places.store, places.states, policy=policy, retain_operations=retain
        )
        with self._lock:
            self._models[model_id] = hosted
        return hosted

    def _drop(self, model_id: str) -> None:
        with self._lock:
            self._models.pop(model_id, None)

    def _thread_of(self, hosted: HostedModel) -> TrainingThread:
        return self._threads[hosted.shared.base.name]

    def _of_session(self, session_id: str) -> list[HostedModel]:
        return [each for each in self.models().values() if each.model_id.startswith(f"{session_id}:")]
