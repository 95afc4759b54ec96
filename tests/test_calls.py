"""DropReason is the one list of reasons why a call is not trained on: used everywhere, documented whole."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import nat_plugin_evsys
from nat_plugin_evsys.calls import DropReason

SOURCE = Path(nat_plugin_evsys.__file__).parent
PAGE = Path(__file__).parents[1] / "docs" / "drop-reasons.md"

OTHER_MEANING = {
    ("finetuning/learner.py", "curriculum_percentile"): "a column of metrics.jsonl",
    ("finetuning/trainer.py", "validation"): "NAT's dataset_type",
    ("report/metrics_log.py", "validation"): "an event of metrics.jsonl",
}
"""Literals that are spelled like a reason and are none."""


def sources() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(SOURCE.rglob("*.py")):
        if path != SOURCE / "calls.py":
            yield str(path.relative_to(SOURCE)), ast.parse(path.read_text())


def docstrings() -> dict[str, str]:
    """Each reason's docstring: the string that follows its assignment."""
    (enum,) = [
        node
        for node in ast.walk(ast.parse((SOURCE / "calls.py").read_text()))
        if isinstance(node, ast.ClassDef) and node.name == "DropReason"
    ]
    found = {}
    for node, following in zip(enum.body, [*enum.body[1:], None], strict=True):
        if isinstance(node, ast.Assign):
            assert isinstance(following, ast.Expr), f"{ast.unparse(node)} has no docstring"
            found[ast.literal_eval(node.value)] = " ".join(ast.literal_eval(following.value).split())
    return found


def test_every_reason_has_a_row_that_says_what_it_means_and_what_to_do() -> None:
    rows = [line.strip("| \n").split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    meanings = {reason.strip("`"): meaning for reason, meaning, _ in rows}
    assert list(meanings) == list(DropReason)
    assert meanings == docstrings()
    assert all(advice.strip() for _, _, advice in rows)


def test_no_reason_is_written_as_a_string() -> None:
    found = {
        (path, node.value): f"{path}:{node.lineno}: {node.value!r}"
        for path, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value in set(DropReason)
    }
    written = [where for key, where in found.items() if key not in OTHER_MEANING]
    assert not written, "write DropReason's member:\n" + "\n".join(written)
    assert OTHER_MEANING.keys() <= found.keys()


def test_every_reason_is_used() -> None:
    used = {
        node.attr
        for _, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "DropReason"
    }
    assert used == set(DropReason.__members__)
