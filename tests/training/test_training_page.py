"""The examples on docs/training.md run as they stand there."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "training.md"


EXAMPLES = [part.split("```")[0] for part in PAGE.read_text().split("```python\n")[1:]]


def printed_by(example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(example, str(PAGE), "exec", dont_inherit=True), {"__name__": "example"})
    return printed.getvalue()


def test_there_are_two_examples() -> None:
    assert len(EXAMPLES) == 2


def test_the_loop_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    norms = [float(line) for line in printed_by(EXAMPLES[0], tmp_path, monkeypatch).split()]
    assert len(norms) == 4
    assert min(norms) > 0


def test_the_adapter_learns_from_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From plain NAT trajectories, without a run of NAT."""
    lines = printed_by(EXAMPLES[1], tmp_path, monkeypatch).splitlines()
    assert len(lines) == 8
    assert all(": completed, reward " in line for line in lines)
    rewards = [float(line.rsplit(" ", 1)[1]) for line in lines]
    assert sum(rewards[-3:]) / 3 > rewards[0] + 0.1
