"""One model under training and the thread that operates it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from nat_plugin_evsys.engine.gradient.operations import OperationFuture, OperationQueue
from nat_plugin_evsys.engine.gradient.trainable import Progress, TrainableModel
from nat_plugin_evsys.errors import EngineClosedError

F = TypeVar("F", bound=OperationFuture[Any])

ModelAction = Callable[[TrainableModel, Progress], Any]
"""``(model, progress) -> result``; ``progress`` is to be handed to the model's method, if that takes one."""


class TrainingQueue:
    """Runs operations on a ``TrainableModel`` in submission order, in its own thread.

    Attributes:
        progress: ``(done tokens, total tokens)`` of the current or last operation.
    """

    def __init__(self, model: TrainableModel) -> None:
        self.progress: tuple[int, int] = (0, 0)
        self._model: TrainableModel | None = model
        self._operations = OperationQueue("evsys-training")

    @property
    def closed(self) -> bool:
        """True after ``close`` was called."""
        return self._operations.closed

    def submit(self, operation: ModelAction, future: F) -> F:
        """Queue ``operation``; its result or error goes into ``future``, which is returned at once.

        Cancelling the future stops a running operation between micro-batches; it has then changed nothing.

        Raises:
            EngineClosedError: the queue has been closed.
        """

        def run(future: F) -> Any:
            def report(done: int, total: int) -> None:
                self.progress = (done, total)
                future.check_cancelled()

            model = self._model
            if model is None:
                raise EngineClosedError("the engine has been closed; create a new one")
            return operation(model, report)

        return self._operations.submit(run, future)

    def close(self, timeout: float | None = None) -> None:
        """Stop the running operation at its next micro-batch, fail the queued ones, release the model."""
        self._operations.close(timeout)
        self._model = None
