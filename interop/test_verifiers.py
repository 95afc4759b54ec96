"""verifiers, unmodified, in an environment of its own: its clients on ``nat evsys serve`` and the policy endpoint."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from interop_program import run_program
from other_environment import python_apart
from serve_process import ServerProcess

NEEDS = ("verifiers==0.4.0", "tinker==0.38.0")
STEPS = 14
"""At most: nothing here has a seed, and one run of many needs more than six."""


@pytest.fixture(scope="module")
def python() -> Path:
    return python_apart("interop-verifiers", NEEDS, "{}.{}".format(*sys.version_info))


@pytest.mark.timeout(1800)
def test_a_verifiers_environment_trains_on_the_server(python: Path, server: ServerProcess, model: Path) -> None:
    settings = {"TINKER_BASE_URL": server.url, "TINKER_API_KEY": "tml-local", "TINKER_TELEMETRY": "0"}
    *steps, evaluated = run_program("verifiers_program.py", model, STEPS, python=python, **settings)
    assert {(step["rollouts"], step["turns"]) for step in steps} == {(32, 2)}
    assert all(step["distance"] < 1e-4 for step in steps), "the learner does not have the sampler's logprobs"
    assert steps[-1]["reward"] > steps[0]["reward"] + 0.3
    assert evaluated["evaluated"] > steps[0]["reward"] + 0.2


@pytest.mark.timeout(1800)
def test_a_verifiers_environment_trains_the_policy_of_this_process(python: Path, model: Path) -> None:
    """Its train client calls the policy endpoint."""
    steps = run_program("verifiers_local.py", python, model, STEPS)
    assert {(step["rollouts"], step["calls"]) for step in steps} == {(32, 64)}
    assert all(set(step["left out"]) <= {"zero_variance_group"} for step in steps)
    ratios = [step["ratio"] for step in steps if not step["left out"]]  # once every rollout has won, all are left out
    assert len(ratios) >= 3
    assert all(abs(ratio - 1) < 1e-3 for ratio in ratios), "the learner does not have the sampler's logprobs"
    assert steps[-1]["reward"] > steps[0]["reward"] + 0.3
