"""Agent Lightning, unmodified, in an environment of its own: its server, proxy and runners on ``nat evsys serve``."""

from __future__ import annotations

from pathlib import Path

import pytest
from interop_program import run_program
from other_environment import python_apart
from serve_process import ServerProcess

NEEDS = ("agentlightning==1.0.2", "tinker==0.38.0")
STEPS = 6


@pytest.mark.timeout(1800)
def test_agent_lightning_trains_on_the_server(server: ServerProcess, model: Path, tmp_path: Path) -> None:
    python = python_apart("interop-lightning", NEEDS, "3.12")
    settings = {"TINKER_BASE_URL": server.url, "TINKER_API_KEY": "tml-local", "TINKER_TELEMETRY": "0"}
    steps = run_program("lightning_program.py", model, tmp_path, STEPS, python=python, **settings)
    assert [(step["rollouts"], step["calls"]) for step in steps] == [(16, 32)] * STEPS
    assert all(step["distance"] < 1e-4 for step in steps), "the learner does not have the sampler's logprobs"
    assert max(step["reward"] for step in steps[-2:]) > steps[0]["reward"] + 0.1
