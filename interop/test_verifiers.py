"""verifiers, unmodified, in an environment of its own: its train client and its eval client on ``nat evsys serve``."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from interop_program import run_program
from other_environment import python_apart
from serve_process import ServerProcess

NEEDS = ("verifiers==0.4.0", "tinker==0.38.0")
STEPS = 6


@pytest.mark.timeout(1800)
def test_a_verifiers_environment_trains_on_the_server(server: ServerProcess, model: Path) -> None:
    python = python_apart("interop-verifiers", NEEDS, "{}.{}".format(*sys.version_info))
    settings = {"TINKER_BASE_URL": server.url, "TINKER_API_KEY": "tml-local", "TINKER_TELEMETRY": "0"}
    *steps, evaluated = run_program("verifiers_program.py", model, STEPS, python=python, **settings)
    assert [(step["rollouts"], step["turns"]) for step in steps] == [(32, 2)] * STEPS
    assert all(step["distance"] < 1e-4 for step in steps), "the learner does not have the sampler's logprobs"
    assert max(step["reward"] for step in steps[-2:]) > steps[0]["reward"] + 0.2
    assert evaluated["evaluated"] > steps[0]["reward"] + 0.2
