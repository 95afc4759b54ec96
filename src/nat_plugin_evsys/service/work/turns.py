"""The training thread of one base model, which its models share fairly."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from functools import partial

from nat_plugin_evsys.service.store.operations import Operation
from nat_plugin_evsys.service.work.execution import Execution
from nat_plugin_evsys.service.work.model import HostedModel

logger = logging.getLogger(__name__)

_AFTER_FAULT_S = 1.0


Turn = tuple[HostedModel, Callable[[], None]]


class TrainingThread:
    """Runs the operations of models over one base, one at a time.

    Start-time fair queueing (Goyal, Vin and Cheng 1996) over engine seconds: of the models that have something to run,
    the one that has used the least goes first. A model that comes back from idling starts level with the one served
    last, so that it neither waits for time it used long ago nor saves time up.

    Args:
        name: of the thread.
        execution: runs a model's operations.
        gap_timeout: seconds after which operations waiting for a missing one are abandoned.
        memory_bytes: of all models in memory; beyond it, all but the last one that ran may be parked.
        on_gone: called with the id of a model that is gone, once nothing here refers to it.
    """

    def __init__(
        self,
        name: str,
        execution: Execution,
        gap_timeout: float,
        on_gone: Callable[[str], None],
        *,
        memory_bytes: int,
    ) -> None:
        self._execution = execution
        self._gap_timeout = gap_timeout
        self._on_gone = on_gone
        self._memory_bytes = memory_bytes
        self._turns = 0
        self._wake = threading.Condition()
        self._models: dict[str, HostedModel] = {}
        self._level = 0.0
        self._closing = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def add(self, hosted: HostedModel, operation: Operation) -> bool:
        """Queue an operation; False if its number has been passed, or the model is gone."""
        with self._wake:
            idle = not hosted.busy and hosted.buffer.ready() is None
            if hosted.gone or not hosted.buffer.add(operation):
                return False
            self._models[hosted.model_id] = hosted
            hosted.park_wanted = False
            if idle and hosted.buffer.ready() is not None:
                hosted.used = max(hosted.used, self._level)
            self._wake.notify()
            return True

    def park(self, hosted: HostedModel) -> None:
        """Unload a model once it has nothing left to run, unless a new operation comes first."""
        with self._wake:
            hosted.park_wanted = True
            self._wake.notify()

    def forget(self, hosted: HostedModel) -> None:
        """Drop a model and its waiting operations. A running operation is finished."""
        with self._wake:
            hosted.gone = True
            self._models.pop(hosted.model_id, None)
            if not hosted.busy:
                hosted.evict()

    def queued(self, hosted: HostedModel) -> int:
        """Operations that have arrived and not ended."""
        with self._wake:
            return len(hosted.buffer)

    def close(self, timeout: float) -> None:
        """Let the running operation end, or stop it after ``timeout`` seconds, then park all models."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread.ident is None:
            return
        self._thread.join(timeout)
        self._stop.set()
        self._thread.join()

    def _loop(self) -> None:
        while (turn := self._next()) is not None:
            hosted, work = turn
            try:
                work()
            except Exception:  # boundary: a fault in one model's turn must not end the others'
                logger.exception(
                    "a turn of model %s failed; its state will be reloaded from the store", hosted.model_id
                )
                hosted.evict()
                time.sleep(_AFTER_FAULT_S)
            finally:
                self._done(hosted)
            del turn, hosted, work
        for hosted in list(self._models.values()):
            try:
                hosted.park()
            except Exception:  # boundary: the other models are parked all the same
                logger.exception("model %s could not be parked", hosted.model_id)

    def _next(self) -> Turn | None:
        """The next turn, waiting for it; None once the engine closes."""
        with self._wake:
            while not self._closing:
                turn = self._crowding() or self._runnable() or self._stranded() or self._parkable()
                if turn is not None:
                    turn[0].busy = True
                    return turn
                self._wake.wait(self._until_stranded())
            return None

    def _crowding(self) -> Turn | None:
        """While the models in memory take too much: the one to park, which is not the last one that ran.

        One with nothing to run is preferred, then one without a gradient, which would be computed again, then the one
        that ran longest ago.
        """
        loaded = sorted((each for each in self._models.values() if each.held_bytes), key=lambda each: each.turn)
        if sum(each.held_bytes for each in loaded) <= self._memory_bytes or len(loaded) == 1:
            return None
        hosted = min(loaded[:-1], key=lambda each: (each.buffer.ready() is not None, each.has_gradient, each.turn))
        logger.info("model %s leaves memory, which the models in it fill", hosted.model_id)
        return hosted, hosted.park

    def _runnable(self) -> Turn | None:
        ready = [(model.used, model) for model in self._models.values() if model.buffer.ready() is not None]
        if not ready:
            return None
        used, hosted = min(ready, key=lambda each: each[0])
        self._level = max(self._level, used)
        operation = hosted.buffer.ready()
        assert operation is not None
        return hosted, partial(self._run, hosted, operation)

    def _run(self, hosted: HostedModel, operation: Operation) -> None:
        started = time.perf_counter()
        ended = self._execution.run(hosted, operation, self._stop)
        with self._wake:
            hosted.used += time.perf_counter() - started
            if ended:
                hosted.buffer.end(operation)

    def _stranded(self) -> Turn | None:
        now = time.monotonic()
        for hosted in self._models.values():
            since = hosted.buffer.stranded_since()
            if since is not None and now - since >= self._gap_timeout:
                waiting, missing = hosted.buffer.give_up()
                why = (
                    f"operation {missing} of model {hosted.model_id} has not arrived within {self._gap_timeout:g} s; "
                    "it and the operations behind it are abandoned"
                )
                return hosted, partial(self._execution.give_up, hosted, waiting, why)
        return None

    def _until_stranded(self) -> float | None:
        since = [s for model in self._models.values() if (s := model.buffer.stranded_since()) is not None]
        return max(0.0, min(since) + self._gap_timeout - time.monotonic()) if since else None

    def _parkable(self) -> Turn | None:
        for hosted in self._models.values():
            if hosted.park_wanted:
                hosted.park_wanted = False
                return hosted, hosted.park
        return None

    def _done(self, hosted: HostedModel) -> None:
        with self._wake:
            hosted.busy = False
            self._turns += 1
            hosted.turn, hosted.held_bytes = self._turns, hosted.model.held_bytes if hosted.model is not None else 0
            if not hosted.gone:
                return
            self._models.pop(hosted.model_id, None)
            hosted.evict()
            waiting, _ = hosted.buffer.give_up()
        self._execution.refuse(waiting, f"there is no model {hosted.model_id}")
        self._on_gone(hosted.model_id)
