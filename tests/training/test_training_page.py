"""The example on docs/training.md runs as it stands there."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "training.md"


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    example = PAGE.read_text().split("```python\n")[1].split("```")[0]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(example, {"__name__": "example"})
    norms = [float(line) for line in printed.getvalue().split()]
    assert len(norms) == 4
    assert min(norms) > 0
