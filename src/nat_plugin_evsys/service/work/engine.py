"""The engine of a server: takes stored operations, runs each exactly once, and stores how it ended."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nat_plugin_evsys.engine.model.loading import BaseModel
from nat_plugin_evsys.engine.sampling.client import LocalSamplingClient
from nat_plugin_evsys.errors import CheckpointError, EvsysError
from nat_plugin_evsys.replicas.base import Replicas
from nat_plugin_evsys.runtime import defaults
from nat_plugin_evsys.runtime.checkpoint_store import CheckpointStore
from nat_plugin_evsys.service.store.operations import Operation
from nat_plugin_evsys.service.wire.kinds import OperationKind
from nat_plugin_evsys.service.work.access import CheckpointAccess
from nat_plugin_evsys.service.work.engine_status import engine_status, model_facts
from nat_plugin_evsys.service.work.hosting import Hosting
from nat_plugin_evsys.service.work.places import Places
from nat_plugin_evsys.service.work.samplers import Samplers
from nat_plugin_evsys.service.work.sampling import SampleRunner
from nat_plugin_evsys.service.work.served_bases import ServedBases
from nat_plugin_evsys.service.work.states import SavedStates, StatePolicy

if TYPE_CHECKING:
    from nat_plugin_evsys.service.store.store import Store

logger = logging.getLogger(__name__)

GAP_TIMEOUT_S = 600.0


class Engine:
    """Trains and samples for many clients. Safe to use from several threads.

    Args:
        store: keeps operations and outcomes, and is this engine's only source for them.
        checkpoints: keeps named checkpoints.
        base_models: ``builtin/…``, directories or hub ids.
        device, dtype, quantization, context_length, cache_dir, trust_remote_code: see ``load_base_model``.
        max_batch_size: see ``Sampler``.
        deterministic: see ``open_here``.
        retain_operations: keep the payloads of operations that a saved state covers.
        model_bytes: see ``Hosting``.
        state_policy: when the states of models are saved.
        gap_timeout: seconds after which operations waiting for a missing one are abandoned.
        replicas: of every base model, on a Ray cluster; None computes in this process.
    """

    def __init__(
        self,
        store: Store,
        checkpoints: CheckpointStore,
        *,
        base_models: Sequence[str],
        device: str = "auto",
        dtype: str = "auto",
        quantization: str = defaults.QUANTIZATION,
        context_length: int | None = None,
        max_batch_size: int = defaults.MAX_BATCH_SIZE,
        deterministic: bool = False,
        cache_dir: Path | None = None,
        trust_remote_code: bool = False,
        retain_operations: bool = False,
        model_bytes: int | None = None,
        state_policy: StatePolicy | None = None,
        gap_timeout: float = GAP_TIMEOUT_S,
        replicas: Replicas | None = None,
    ) -> None:
        self._store = store
        self._bases = ServedBases(
            base_models,
            replicas,
            max_batch_size=max_batch_size,
            deterministic=deterministic,
            device=device,
            dtype=dtype,
            quantization=quantization,
            context_length=context_length,
            cache_dir=cache_dir,
            trust_remote_code=trust_remote_code,
        )
        access = CheckpointAccess(store, checkpoints)
        self._states = SavedStates(store.root / "states")
        self._samplers = Samplers(store, self._bases, access, store.root / "samplers")
        self._closing = threading.Event()
        self._hosting = Hosting(
            Places(store, checkpoints, access, self._states, self._samplers),
            self._bases,
            self._closing,
            gap_timeout=gap_timeout,
            policy=state_policy or StatePolicy(),
            retain_operations=retain_operations,
            model_bytes=model_bytes,
        )
        self._sampling = SampleRunner(store, self._samplers, self._closing)
        # One thread: operations of a model reach its buffer in the order of their submission.
        self._intake = ThreadPoolExecutor(1, thread_name_prefix="evsys-intake")
        self._lock = threading.Lock()

    def start(self) -> None:
        """Load the base models, and resume what a previous server left unfinished.

        Raises:
            ModelError: a base model cannot be loaded.
        """
        self._hosting.start(self._bases.load())
        self._remove_leftovers()
        unfinished = self._store.unfinished()
        if unfinished:
            logger.info("resuming %d unfinished operations", len(unfinished))
        for operation in unfinished:
            self.submit(operation)

    def submit(self, operation: Operation) -> None:
        """Accept a stored operation. Never blocks. Once the engine closes, the operation stays in the store."""
        with self._lock:
            if self._closing.is_set():
                return
            if operation.kind == OperationKind.SAMPLE:
                self._sampling.submit(operation)
            else:
                self._intake.submit(self._hosting.take, operation)

    def cancel(self, request_id: str) -> None:
        """Stop a sampling request, if it has not ended; training continues."""
        self._sampling.cancel(request_id)

    def park_session(self, session_id: str) -> None:
        """Unload a session's models once they have nothing left to run; they are reloaded on demand."""
        self._hosting.park_session(session_id)
        self._samplers.close_session(session_id)

    def forget_session(self, session_id: str) -> None:
        """Drop a session's models, their state and its ephemeral weights. Checkpoints stay."""
        self._hosting.forget_session(session_id)
        for model_id in self._states.model_ids():
            if model_id.startswith(f"{session_id}:"):
                self._states.forget(model_id)
        self._samplers.forget_session(session_id)

    def base_models(self) -> list[BaseModel]:
        """The models that are served."""
        return self._bases.models()

    def describe(self, model_id: str) -> dict[str, Any]:
        """The body of the answer to ``get_info``.

        Raises:
            CheckpointError: there is no such model.
        """
        row = self._store.model(model_id)
        if row is None:
            raise CheckpointError(f"there is no model {model_id}")
        return model_facts(row, self._bases.get(row.base_model).base)

    def sampling_client(self, model: str, owner: str) -> tuple[LocalSamplingClient, BaseModel]:
        """A client by base model, tinker:// path or training run; see ``Samplers.find``."""
        return self._samplers.find(model, owner)

    def status(self) -> dict[str, Any]:
        """The engine's activity; see ``engine_status``."""
        return engine_status(self._store, self._hosting, self._sampling, self._samplers, self._bases)

    def scale(self, replicas: int, base_model: str | None = None) -> None:
        """Add or remove replicas; see ``ServedBases.scale``. Blocks until it is done."""
        self._bases.scale(replicas, base_model)

    def close(self, timeout: float = 30.0) -> None:
        """Finish running operations, or stop them after ``timeout`` seconds; save the models' state; free everything.

        Unfinished operations stay in the store, and the next server runs them.
        """
        deadline = time.monotonic() + timeout
        with self._lock:
            self._closing.set()
        self._intake.shutdown(wait=True, cancel_futures=True)
        closing = self._hosting.close(deadline)
        self._sampling.close(max(0.0, deadline - time.monotonic()))
        for thread in closing:
            thread.join()
        self._bases.close()
        self._sampling.shutdown()

    def _remove_leftovers(self) -> None:
        """Finish deleting what a killed server was deleting."""
        for model_id in self._states.model_ids():
            try:
                if self._store.model(model_id) is None:
                    self._states.forget(model_id)
            except EvsysError as exc:
                logger.error("leftovers of model %s remain: %s", model_id, exc)
