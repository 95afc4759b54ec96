"""NeMo Gym, unmodified, in an environment of its own: its agent and its verifier on the policy endpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
from interop_program import run_program
from other_environment import python_apart

NEEDS = ("nemo-gym==0.4.0", "reasoning-gym==0.1.25", "uv")
"""The newest release that is not for Python 3.13.14 and later alone."""


@pytest.mark.timeout(1800)
def test_a_gym_environment_trains_the_policy(tmp_path: Path) -> None:
    gym = python_apart("interop-gym", NEEDS, "3.12").parent
    steps = run_program("gym_program.py", gym, "builtin/smollm2-135m", tmp_path, 5)
    assert [step["rollouts"] for step in steps] == [128] * 5
    assert steps[0]["reward"] < 0.2
    assert steps[-1]["reward"] > 0.5
    ratios = [step["ratio"] for step in steps if step["ratio"] is not None]
    assert ratios
    assert all(abs(ratio - 1) < 1e-3 for ratio in ratios)
