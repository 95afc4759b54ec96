"""Generates the ``_async`` twin of a method, and methods that refuse."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, TypeVar

from nat_plugin_evsys.engine.gradient.operations import OperationFuture
from nat_plugin_evsys.errors import UnsupportedError

S = TypeVar("S")
P = ParamSpec("P")
T = TypeVar("T")
C = TypeVar("C", bound=Callable[..., Any])
F = TypeVar("F", bound=OperationFuture[Any])


def submits(method: Callable[Concatenate[S, P], F]) -> Callable[Concatenate[S, P], Coroutine[Any, Any, F]]:
    """The coroutine that submits at once and returns the future, as Tinker's training calls do.

    ``await (await client.forward_async(…))`` is the result. With ``wait=True`` the coroutine itself waits.
    """

    async def submit(self: S, /, *args: P.args, **kwargs: P.kwargs) -> F:
        wait = kwargs.pop("wait", False)
        future = method(self, *args, **kwargs)
        if wait:
            await future
        return future

    return _twin(submit, method, "returns the future")


def awaits(method: Callable[Concatenate[S, P], Awaitable[T]]) -> Callable[Concatenate[S, P], Coroutine[Any, Any, T]]:
    """The coroutine that waits for the result, as Tinker's sampling and creating calls do."""

    async def wait(self: S, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await method(self, *args, **kwargs)

    return _twin(wait, method, "returns the result")


def answers(method: Callable[Concatenate[S, P], T]) -> Callable[Concatenate[S, P], Coroutine[Any, Any, T]]:
    """The coroutine of a method that returns at once."""

    async def answer(self: S, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return method(self, *args, **kwargs)

    return _twin(answer, method, "returns the same")


def refuses(owner: str, name: str, why: str) -> Callable[..., Any]:
    """A method that raises ``UnsupportedError``, naming itself and the reason."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise UnsupportedError(f"{owner}.{name} is not offered: {why}")

    refuse.__name__, refuse.__qualname__ = name, f"{owner}.{name}"
    refuse.__doc__ = f"Not offered: {why}. Raises UnsupportedError."
    return refuse


def _twin(coroutine: C, method: Any, returns: str) -> C:
    twin: Any = coroutine
    twin.__name__ = f"{method.__name__}_async"
    twin.__qualname__ = f"{method.__qualname__}_async"
    twin.__module__ = method.__module__
    twin.__wrapped__ = method  # inspect.signature and help() then show the parameters
    twin.__doc__ = f"Like ``{method.__name__}``, as a coroutine that {returns}."
    return coroutine
