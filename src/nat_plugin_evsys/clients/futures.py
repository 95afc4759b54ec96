"""What the clients' calls return: ``OperationFuture``, and the forms that Weaver's and Tinker's examples use."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, TypeVar

from nat_plugin_evsys.clients.results import ForwardBackwardOutput
from nat_plugin_evsys.engine.gradient.operations import OperationFuture

T = TypeVar("T")
C = TypeVar("C")
F = TypeVar("F", bound=OperationFuture[Any])


class ResultFuture(OperationFuture[T]):
    """An ``OperationFuture`` that may be read as its result: indexing, ``in``, ``keys``, ``len``, ``str`` … wait.

    *Extension*, for Weaver's ``sampling_client.sample(…)["sequences"][0]`` and its list of ``compute_logprobs(…)``.
    """

    def __getitem__(self, key: Any) -> Any:
        result: Any = self.result()
        return result[key]

    def get(self, key: str, default: Any = None) -> Any:
        """``result().get(key, default)``."""
        result: Any = self.result()
        return result.get(key, default)

    def keys(self) -> Any:
        """``result().keys()``."""
        result: Any = self.result()
        return result.keys()

    def items(self) -> Any:
        """``result().items()``."""
        result: Any = self.result()
        return result.items()

    def values(self) -> Any:
        """``result().values()``."""
        result: Any = self.result()
        return result.values()

    def __contains__(self, key: object) -> bool:
        result: Any = self.result()
        return key in result

    def __len__(self) -> int:
        result: Any = self.result()
        return len(result)

    def __iter__(self) -> Iterator[Any]:
        result: Any = self.result()
        return iter(result)

    def __bool__(self) -> bool:
        # ``if future:`` must not wait, as it would through __len__.
        return True

    def __str__(self) -> str:
        """The result's text (Weaver prints the logprobs); waits for it. ``repr`` does not."""
        return repr(self) if self._future.exception() is not None else str(self.result())

    def __repr__(self) -> str:
        return _repr(self)


class ForwardBackwardFuture(ResultFuture[ForwardBackwardOutput]):
    """The future of ``forward``, ``forward_backward`` and ``forward_backward_custom`` (Loops' name)."""


class ClientFuture(OperationFuture[C]):
    """A future of a client that may be used as the client itself: attribute access waits until the client is ready.

    Tinker's examples omit ``.result()``, and its SDK allows that; as there, the future of a client passes
    ``isinstance`` for the client's class, and for its own.

    Attributes:
        KIND: the client's class.
    """

    KIND: ClassVar[type]

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return self.KIND

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.result(), name)

    def __repr__(self) -> str:
        return _repr(self)


def after(future: F, wait: bool) -> F:
    """``future``; with ``wait`` only once it is done, raising its error if it failed."""
    if wait:
        future.result()
    return future


def failed(future: F, error: Exception) -> F:
    """``future``, failed."""
    future.future().set_exception(error)
    return future


def _repr(future: OperationFuture[Any]) -> str:
    inner = future.future()
    if not inner.done():
        state = "pending"
    elif inner.cancelled():
        state = "cancelled"
    elif (error := inner.exception()) is not None:
        state = f"failed: {error!r}"
    else:
        state = repr(inner.result())
    return f"<{type(future).__name__} {state}>"
