"""OpenPipe ART, unmodified, in an environment of its own, trains on ``nat evsys serve``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serve_process import ServerProcess, start_server

from nat_plugin_evsys.engine.model.builtin import ensure_builtin

ROOT = Path(__file__).parents[1]
ENVIRONMENT = ROOT / ".venv-interop-art"
NEEDS = ("openpipe-art==0.5.18", "tinker-cookbook==0.5.8", "openai<3")
"""The project itself has openai 3, and this environment sees the project's packages."""
STEPS, STEPS_RESUMED = 6, 3


@pytest.fixture(scope="module")
def art_python() -> Path:
    """An interpreter that has ART. torch, transformers and the SDK are those of the project: installed once."""
    python = ENVIRONMENT / "bin" / "python"
    if not python.exists():
        venv.create(ENVIRONMENT, with_pip=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = ENVIRONMENT / "lib" / version / "site-packages"
    (site / "zz_project.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # pip also complains about packages of the project that are installed without their dependencies; that is meant.
    done = subprocess.run([*pip, *NEEDS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return python


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``builtin/tiny`` as a directory: ART's side has to find its tokenizer."""
    return Path(ensure_builtin("builtin/tiny", tmp_path_factory.mktemp("models")))


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    process = start_server(model, tmp_path_factory.mktemp("service") / "store")
    yield process
    process.stop()


def run(python: Path, server: ServerProcess, model: Path, directory: Path, steps: int) -> list[dict[str, Any]]:
    """The program's training steps."""
    settings = {"TINKER_BASE_URL": server.url, "TINKER_API_KEY": "tml-local", "TINKER_TELEMETRY": "0"}
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(python), "-W", "ignore", str(ROOT / "interop" / "art_program.py"), str(model), str(directory)]
    done = subprocess.run(
        [*command, str(steps)],
        capture_output=True,
        text=True,
        timeout=600,
        env={**kept, **settings, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.timeout(1800)
def test_art_learns_and_resumes(art_python: Path, server: ServerProcess, model: Path, tmp_path: Path) -> None:
    """ART samples, groups, trains and saves; its tokens are ours, so that the first ratios are 1."""
    steps = run(art_python, server, model, tmp_path / "art", STEPS)
    resumed = run(art_python, server, model, tmp_path / "art", STEPS_RESUMED)
    for step in (*steps, *resumed):
        print(json.dumps(step))
    assert len(steps) == STEPS
    assert all(step["rollouts"] == 32 for step in steps)
    assert all(abs(step["ratio"] - 1) < 1e-3 for step in (*steps, *resumed) if step["ratio"] is not None)
    assert steps[0]["ratio"] is not None
    assert max(step["reward"] for step in steps[-2:]) > steps[0]["reward"] + 0.15
    # It goes on from the checkpoint: with what was learned, and with the numbers of its steps.
    assert resumed[0]["step"] >= steps[-1]["step"]
    assert resumed[0]["reward"] > steps[0]["reward"] + 0.15
