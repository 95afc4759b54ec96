"""The engine of a server: takes stored operations, runs each exactly once, and stores how it ended."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nat_plugin_evsys.engine.model.loading import BaseModel
from nat_plugin_evsys.engine.sampling.client import LocalSamplingClient
from nat_plugin_evsys.errors import CheckpointError, EvsysError
from nat_plugin_evsys.runtime import defaults
from nat_plugin_evsys.runtime.bases import SharedBase
from nat_plugin_evsys.runtime.checkpoint_store import CheckpointStore
from nat_plugin_evsys.service.store.operations import Operation, OperationKind
from nat_plugin_evsys.service.wire.requests import CreateModel, LoadWeights, parse
from nat_plugin_evsys.service.work.access import CheckpointAccess
from nat_plugin_evsys.service.work.engine_status import engine_status, model_facts
from nat_plugin_evsys.service.work.execution import Execution
from nat_plugin_evsys.service.work.failures import failure, failure_of
from nat_plugin_evsys.service.work.model import HostedModel
from nat_plugin_evsys.service.work.opening import ModelOpening
from nat_plugin_evsys.service.work.samplers import Samplers
from nat_plugin_evsys.service.work.sampling import SamplingDesk
from nat_plugin_evsys.service.work.served_bases import ServedBases
from nat_plugin_evsys.service.work.states import SnapshotPolicy, Snapshots
from nat_plugin_evsys.service.work.training_work import Journal, TrainingWork
from nat_plugin_evsys.service.work.turns import TrainingThread

if TYPE_CHECKING:
    from nat_plugin_evsys.service.store.rows import SamplerRow
    from nat_plugin_evsys.service.store.store import Store

logger = logging.getLogger(__name__)

GAP_TIMEOUT_S = 600.0


class Engine:
    """Trains and samples for many clients. Safe to use from several threads.

    Args:
        store: keeps operations and outcomes; whatever this engine knows of them comes from there.
        checkpoints: keeps named checkpoints.
        base_models: ``builtin/…``, directories or hub ids.
        device, dtype, context_length, cache_dir, trust_remote_code: see ``load_base_model``.
        max_batch_size: see ``Sampler``.
        retain_operations: keep the payloads of operations that a snapshot covers.
        on_finished: told a request's id, in a thread of the engine, once its outcome is stored.
        snapshot_policy: when state snapshots are taken.
        gap_timeout: seconds after which operations that wait for one that does not come are given up.
    """

    def __init__(
        self,
        store: Store,
        checkpoints: CheckpointStore,
        *,
        base_models: Sequence[str],
        device: str = "auto",
        dtype: str = "auto",
        context_length: int | None = None,
        max_batch_size: int = defaults.MAX_BATCH_SIZE,
        cache_dir: Path | None = None,
        trust_remote_code: bool = False,
        retain_operations: bool = False,
        on_finished: Callable[[str], None] = lambda _: None,
        snapshot_policy: SnapshotPolicy | None = None,
        gap_timeout: float = GAP_TIMEOUT_S,
    ) -> None:
        self._store = store
        self._bases = ServedBases(
            base_models,
            max_batch_size=max_batch_size,
            device=device,
            dtype=dtype,
            context_length=context_length,
            cache_dir=cache_dir,
            trust_remote_code=trust_remote_code,
        )
        self._access = CheckpointAccess(store, checkpoints)
        self._snapshots = Snapshots(store.root / "states")
        self._samplers = Samplers(store, self._bases, self._access, store.root / "samplers")
        self._journal = Journal(store, on_finished)
        opening = ModelOpening(store, self._access, self._snapshots)
        execution = Execution(checkpoints, self._access, self._snapshots, self._samplers, opening)
        self._work = TrainingWork(self._journal, execution, gap_timeout)
        self._sampling = SamplingDesk(self._journal, self._samplers)
        self._threads: dict[str, TrainingThread] = {}
        self._policy = snapshot_policy or SnapshotPolicy()
        self._retain = retain_operations
        self._gap_timeout = gap_timeout
        # One thread: operations of a model reach its buffer in the order of their submission.
        self._intake = ThreadPoolExecutor(1, thread_name_prefix="evsys-intake")
        self._lock = threading.Lock()
        self._hosted: dict[str, HostedModel] = {}
        self._closing = False

    def start(self) -> None:
        """Load the base models, and take up what a former server left unfinished.

        Raises:
            ModelError: a base model cannot be loaded.
        """
        for shared in self._bases.load():
            thread = TrainingThread(f"evsys-train-{len(self._threads)}", self._work, self._gap_timeout, self._unhost)
            self._threads[shared.base.name] = thread
            thread.start()
        self._remove_leftovers()
        unfinished = self._store.unfinished()
        if unfinished:
            logger.info("taking up %d unfinished operations", len(unfinished))
        for operation in unfinished:
            self.submit(operation)

    def submit(self, operation: Operation) -> None:
        """Take an operation that has been stored. Never blocks. Once the engine closes, it stays in the store."""
        with self._lock:
            if self._closing:
                return
            if operation.kind == OperationKind.SAMPLE:
                self._sampling.submit(operation)
            else:
                self._intake.submit(self._take, operation)

    def cancel(self, request_id: str) -> None:
        """Stop a sampling request, if it has not ended; what trains goes on."""
        self._sampling.cancel(request_id)

    def park_session(self, session_id: str) -> None:
        """Take a session's models out of memory as soon as what they can run has run; they come back by themselves."""
        for hosted in self._of_session(session_id):
            self._thread_of(hosted).park(hosted)
        self._samplers.close_session(session_id)

    def forget_session(self, session_id: str) -> None:
        """Drop a session's models, their state and its ephemeral weights. Checkpoints stay."""
        for hosted in self._of_session(session_id):
            self._thread_of(hosted).forget(hosted)
            with self._lock:
                self._hosted.pop(hosted.model_id, None)
        for model_id in self._snapshots.model_ids():
            if model_id.startswith(f"{session_id}:"):
                self._snapshots.forget(model_id)
        self._samplers.forget_session(session_id)

    def base_models(self) -> list[BaseModel]:
        """The models that are served."""
        return self._bases.models()

    def describe(self, model_id: str) -> dict[str, Any]:
        """The body that ``get_info`` is answered with.

        Raises:
            CheckpointError: there is no such model.
        """
        row = self._store.model(model_id)
        if row is None:
            raise CheckpointError(f"there is no model {model_id}")
        return model_facts(row, self._bases.get(row.base_model).base)

    def open_sampler(self, row: SamplerRow) -> LocalSamplingClient:
        """The client of a sampling session; see ``Samplers.open``."""
        return self._samplers.open(row)

    def sampling_client(self, model: str, owner: str) -> tuple[LocalSamplingClient, BaseModel]:
        """A client by base model, tinker:// path or training run; see ``Samplers.find``."""
        return self._samplers.find(model, owner)

    def status(self) -> dict[str, Any]:
        """What runs: see ``engine_status``."""
        with self._lock:
            hosted = list(self._hosted.values())
        queued = {each.model_id: self._thread_of(each).queued(each) for each in hosted}
        return engine_status(self._store, hosted, queued, self._work, self._sampling, self._samplers)

    def close(self, timeout: float = 30.0) -> None:
        """Let what runs now end, or stop it after ``timeout`` seconds; write the models' state; free everything.

        What has not ended stays in the store, unfinished, and is run by the next server.
        """
        deadline = time.monotonic() + timeout
        with self._lock:
            self._closing = True
        self._intake.shutdown(wait=True, cancel_futures=True)
        self._journal.close()
        closing = [
            threading.Thread(target=thread.close, args=(max(0.0, deadline - time.monotonic()),))
            for thread in self._threads.values()
        ]
        for each in closing:
            each.start()
        self._sampling.close(max(0.0, deadline - time.monotonic()))
        for each in closing:
            each.join()
        self._bases.close()
        self._sampling.shutdown()
        with self._lock:
            self._hosted.clear()

    def _take(self, operation: Operation) -> None:
        """Bring an operation to its model. In the intake thread."""
        try:
            hosted = self._model_of(operation)
            if hosted is None:
                self._journal.finish(operation, failure(f"there is no model {operation.scope}"))
            elif not self._thread_of(hosted).add(hosted, operation):
                gone = f"there is no model {operation.scope}"
                late = (
                    f"operation {operation.seq_id} of model {operation.scope} came too late: operation "
                    f"{hosted.buffer.next_seq} is next, and this one was given up"
                )
                self._journal.finish(operation, failure(gone if hosted.gone else late))
        except Exception as exc:  # noqa: BLE001 - boundary: whatever is wrong belongs to the operation's future
            self._journal.finish(operation, failure_of(operation, exc))

    def _model_of(self, operation: Operation) -> HostedModel | None:
        with self._lock:
            hosted = self._hosted.get(operation.scope)
        if hosted is not None:
            return hosted
        row = self._store.model(operation.scope)
        if row is not None:
            if row.owner != operation.owner:
                return None
            return self._host(operation.scope, self._bases.get(row.base_model), row.next_seq)
        if operation.seq_id != 0:
            return None
        return self._host(operation.scope, self._base_asked_for(operation), 0)

    def _base_asked_for(self, operation: Operation) -> SharedBase:
        """The base model of a model that is to be made.

        Raises:
            EvsysError: the request is malformed, or names a base model or checkpoint that is not here.
        """
        if operation.kind == OperationKind.CREATE_MODEL:
            return self._bases.get(parse(CreateModel, operation.payload).base_model)
        body = parse(LoadWeights, operation.payload)
        if body.base_model is not None:
            return self._bases.get(body.base_model)
        return self._bases.of_checkpoint(self._access.read(body.path, operation.owner))

    def _host(self, model_id: str, shared: SharedBase, next_seq: int) -> HostedModel:
        hosted = HostedModel(
            model_id,
            shared,
            next_seq,
            self._store,
            self._snapshots,
            policy=self._policy,
            retain_operations=self._retain,
        )
        with self._lock:
            self._hosted[model_id] = hosted
        return hosted

    def _unhost(self, model_id: str) -> None:
        with self._lock:
            self._hosted.pop(model_id, None)

    def _thread_of(self, hosted: HostedModel) -> TrainingThread:
        return self._threads[hosted.shared.base.name]

    def _of_session(self, session_id: str) -> list[HostedModel]:
        with self._lock:
            return [each for each in self._hosted.values() if each.model_id.startswith(f"{session_id}:")]

    def _remove_leftovers(self) -> None:
        """Delete what a killed server had not finished forgetting."""
        for model_id in self._snapshots.model_ids():
            try:
                if self._store.model(model_id) is None:
                    self._snapshots.forget(model_id)
            except EvsysError as exc:
                logger.error("leftovers of model %s stay: %s", model_id, exc)
