"""All exception classes are in ``errors``, and the tree at its top is the tree that they make."""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Iterator
from pathlib import Path

import nat_plugin_evsys
from nat_plugin_evsys import errors

SOURCE = Path(nat_plugin_evsys.__file__).parent
Node = tuple[str, list[str]]
"""A class and its bases."""


def drawing() -> list[Node]:
    """The classes as the docstring draws them: the parent first, then what ``(also a …)`` names."""
    found: list[Node] = []
    above: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        if drawn := re.fullmatch(r"(?P<lines>[│├└─ ]*)(?P<name>\w+) {2,}(?P<text>.+)", line):
            depth = len(drawn["lines"]) // 4
            above[depth:] = [drawn["name"]]
            found.append(
                (drawn["name"], [*above[depth - 1 : depth], *re.findall(r"\(also an? (\w+)\)", drawn["text"])])
            )
        elif line == "Exception":
            above = [line]
    return found


def definitions(path: Path) -> Iterator[Node]:
    """Classes that are exceptions, by the names of their bases."""
    exceptions = {name for name, each in vars(builtins).items() if isinstance(each, type) and _raises(each)}
    exceptions |= {name for name, each in vars(errors).items() if isinstance(each, type)}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef):
            bases = [ast.unparse(base).rpartition(".")[2] for base in node.bases]
            if any(base in exceptions or base.endswith(("Error", "Exception")) for base in bases):
                yield node.name, bases


def _raises(kind: type) -> bool:
    return issubclass(kind, BaseException)


def test_the_drawing_is_the_tree_in_the_order_of_the_classes() -> None:
    assert drawing() == list(definitions(SOURCE / "errors.py"))


def test_no_exception_class_is_defined_elsewhere() -> None:
    found = [
        f"{path.relative_to(SOURCE)}: class {name}"
        for path in sorted(SOURCE.rglob("*.py"))
        if path != SOURCE / "errors.py"
        for name, _ in definitions(path)
    ]
    assert not found, "\n".join(found)


def test_every_class_says_what_it_means() -> None:
    for name, _ in drawing():
        assert (getattr(errors, name).__doc__ or "").strip(), name


def test_the_causes_of_an_error_end_where_they_come_back_to_it() -> None:
    """CrewAI keeps a failed call's error and raises it again while it handles the one it raised from it."""
    first, second = ValueError("first"), ValueError("second")
    first.__context__, second.__cause__ = second, first
    assert list(errors.causes(first)) == [first]
    assert list(errors.causes(first, implicit=True)) == [first, second]
    assert list(errors.causes(second)) == [second, first]
    assert list(errors.causes(None)) == []
