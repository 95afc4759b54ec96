"""The Backend protocol is all that a user of a backend needs, and both backends are what it says.

That the types of arguments and results fit is mypy's part: ``policy.weights.create_backend`` returns either as a
``Backend``.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import nat_plugin_evsys
from nat_plugin_evsys.backends.base import Backend
from nat_plugin_evsys.backends.local import LocalBackend
from nat_plugin_evsys.backends.ray import RayBackend
from nat_plugin_evsys.backends.remote.backend import TinkerBackend

SOURCE = Path(nat_plugin_evsys.__file__).parent
BACKENDS = (LocalBackend, RayBackend, TinkerBackend)
MEMBERS = {name: member for name, member in vars(Backend).items() if not name.startswith("_")}
"""Methods and properties; the attribute ``checkpoint_dir`` is what instances are asked for elsewhere."""


def differences(expected: Any, found: Any) -> Iterator[str]:
    """What keeps ``found`` from standing in for ``expected``; more keywords with a default are welcome."""
    if isinstance(expected, property):
        if not isinstance(found, property):
            yield f"is {found!r}, not a property"
        return
    if inspect.iscoroutinefunction(expected) != inspect.iscoroutinefunction(found):
        yield "is a coroutine function in one and a plain one in the other"
    wanted, offered = inspect.signature(expected).parameters, inspect.signature(found).parameters
    for name, parameter in wanted.items():
        other = offered.get(name)
        if other is None or (other.kind, other.default) != (parameter.kind, parameter.default):
            yield f"takes `{other}` where Backend has `{parameter}`"
    for name in offered.keys() - wanted.keys():
        if offered[name].kind is not inspect.Parameter.KEYWORD_ONLY or offered[name].default is inspect.Parameter.empty:
            yield f"asks for `{offered[name]}`, which Backend does not have"


def test_the_protocol_is_whole() -> None:
    needed = {"progress", "discard_gradient_async", "delete_checkpoint", "sampling_client"}
    assert needed <= MEMBERS.keys()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MEMBERS)
def test_a_backend_has_the_member_as_the_protocol_has_it(backend: type, name: str) -> None:
    assert list(differences(MEMBERS[name], inspect.getattr_static(backend, name))) == []


def questions(tree: ast.AST) -> Iterator[ast.Call]:
    """Calls that ask a backend what it is or has: ``getattr(backend, …)``, ``isinstance(policy.backend, …)``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "isinstance"):
            asked, kind = (ast.unparse(argument) for argument in node.args[:2])
            if asked.rpartition(".")[2].strip("_") == "backend" or "Backend" in kind:
                yield node


def test_no_user_of_a_backend_asks_which_one_it_is() -> None:
    found = [
        f"{path.relative_to(SOURCE)}:{call.lineno}: {ast.unparse(call)}"
        for path in sorted(SOURCE.rglob("*.py"))
        for call in questions(ast.parse(path.read_text()))
    ]
    assert not found, "\n".join(found)
