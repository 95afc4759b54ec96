"""OpenPipe ART, unmodified, in an environment of its own: on ``nat evsys serve``, and on the engine in its process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from interop_program import run_program
from other_environment import python_with
from serve_process import ServerProcess

NEEDS = ("openpipe-art==0.5.18", "tinker-cookbook==0.5.8", "openai<3")
"""The project itself has openai 3, and this environment sees the project's packages."""
STEPS, STEPS_RESUMED = 6, 3


@pytest.fixture(scope="module")
def art_python() -> Path:
    """An interpreter that has ART. torch, transformers and the SDK are those of the project: installed once."""
    return python_with("interop-art", NEEDS)


def check(first: list[dict[str, Any]], resumed: list[dict[str, Any]]) -> None:
    """It learned, on the tokens that were sampled, and went on from the checkpoint with what was learned."""
    start, *steps, end = first
    loaded, *later, _ = resumed
    assert len(steps) == STEPS
    assert all(step["rollouts"] == 32 for step in steps)
    ratios = [step["ratio"] for step in (*steps, *later) if step["ratio"] is not None]
    assert all(abs(ratio - 1) < 1e-3 for ratio in ratios)
    assert steps[0]["ratio"] is not None
    assert max(step["reward"] for step in steps[-2:]) > steps[0]["reward"] + 0.15
    assert later[0]["step"] >= steps[-1]["step"]
    # Not by rewards: a step at the program's high rate may cost some, and the next earns them again.
    assert end["greedy"] != pytest.approx(start["greedy"], abs=1e-2)
    assert loaded["greedy"] == pytest.approx(end["greedy"], abs=1e-4)


@pytest.mark.timeout(1800)
def test_art_trains_on_the_server(art_python: Path, server: ServerProcess, model: Path, tmp_path: Path) -> None:
    settings = {"TINKER_BASE_URL": server.url, "TINKER_API_KEY": "tml-local", "TINKER_TELEMETRY": "0"}
    runs = [
        run_program("art_program.py", model, tmp_path, count, python=art_python, **settings)
        for count in (STEPS, STEPS_RESUMED)
    ]
    check(*runs)


@pytest.mark.timeout(1800)
def test_art_trains_in_its_own_process(art_python: Path, tmp_path: Path) -> None:
    runs = [
        run_program("art_local.py", "builtin/tiny", tmp_path, count, python=art_python)
        for count in (STEPS, STEPS_RESUMED)
    ]
    check(*runs)
