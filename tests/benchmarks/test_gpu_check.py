"""The frame of the GPU check: what a part found survives its end, and the exit code says what came out."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from part_process import Part, run_part
from place import Place
from verdict import CUT, FAILED, OK, SKIPPED, SLOW, Result, exit_code

ROOT = Path(__file__).parents[2]

PARTS = {
    "well": """
def run(findings, place, title):
    findings.exact(f"{title} gradient", 1e-6, 1e-5)
    findings.figure("seconds", 2.0)
""",
    "wrong": """
def run(findings, place):
    findings.exact("gradient", 2e-5, 1e-5)
    findings.exact("logprobs", float("nan"), 1e-5)
    findings.exact("resume", 0, 0)
""",
    "slow": """
def run(findings, place):
    findings.row({"name": "W1", "ratio": 3.0, "floor": 4.0, "aim": 8.0, "min": 3.0, "max": 3.0})
""",
    "half": """
def run(findings, place):
    with findings.attempt("first half"):
        raise ValueError("no such kernel")
    findings.exact("second half", 0.0, 0.0)
""",
    "dying": """
import os
def run(findings, place):
    findings.figure("seconds", 2.0)
    os._exit(3)
""",
    "hanging": """
import time
def run(findings, place):
    findings.exact("gradient", 0.0, 1e-5)
    time.sleep(600)
""",
}
PLACE = """
from place import Place

class AnyPlace(Place):
    def prepare(self):
        return {}
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Parts run in a process of their own, in which torch need not be loaded."""
    for name, source in PARTS.items():
        (tmp_path / f"part_{name}.py").write_text(source)
    (tmp_path / "any_place.py").write_text(PLACE)
    monkeypatch.syspath_prepend(tmp_path)
    made: Place = importlib.import_module("any_place").AnyPlace("cpu", False, tmp_path)
    return made


def run(name: str, place: Place, *arguments: str, most_s: float = 60.0) -> Result:
    found: list[int] = []
    result = run_part(
        Part(name, f"part_{name}", most_s, arguments), place, 100.0, lambda r: found.append(len(r.findings))
    )
    assert found == list(range(1, len(result.findings) + 1)), "each finding is told at once"
    return result


def test_a_part_that_holds(place: Place) -> None:
    result = run("well", place, "4B")
    assert (result.outcome, exit_code([result], ["well"])) == (OK, 0)
    assert "1 comparisons hold, the worst: 4B gradient 1.0e-06 of 1e-05" in result.line()
    assert "seconds 2" in result.line()


def test_wrong_numbers_fail_and_nan_is_wrong(place: Place) -> None:
    result = run("wrong", place)
    assert (result.outcome, exit_code([result], [])) == (FAILED, 1)
    assert "2 of 3 comparisons fail, the worst: logprobs nan of 1e-05" in result.line()


def test_below_its_floor_is_said_and_is_no_failure(place: Place) -> None:
    result = run("slow", place)
    assert (result.outcome, exit_code([result], [])) == (SLOW, 0)
    assert "W1 3.00 (floor 4)" in result.line()


def test_what_breaks_fails_and_does_not_hide_the_rest(place: Place) -> None:
    result = run("half", place)
    assert (result.outcome, exit_code([result], [])) == (FAILED, 1)
    assert [f["name"] for f in result.of_kind("exact")] == ["second half"]
    assert "no such kernel" in result.of_kind("broken")[0]["text"]


def test_a_process_that_dies_fails_and_keeps_what_it_found(place: Place) -> None:
    result = run("dying", place)
    assert (result.outcome, exit_code([result], [])) == (FAILED, 1)
    assert "ended with exit code 3" in result.line()
    assert result.of_kind("figure")


def test_a_part_is_stopped_in_time_and_keeps_what_it_found(place: Place) -> None:
    result = run("hanging", place, most_s=8.0)
    assert result.outcome == CUT
    assert result.seconds < 60
    assert exit_code([result], []) == 0
    assert exit_code([result], ["hanging"]) == 1, "exactness must be shown"
    assert result.of_kind("exact")


def test_a_part_that_was_not_begun() -> None:
    result = Result("judge", ended="3 s were left")
    assert (result.outcome, exit_code([result], []), exit_code([result], ["judge"])) == (SKIPPED, 0, 1)


def check(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [str(ROOT / "benchmarks" / "gpu" / "check.sh"), *arguments]
    env = {**os.environ, "PYTHON": sys.executable, **environment}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=250)


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = check("--only", "judge", CUDA_VISIBLE_DEVICES="", OUT=str(tmp_path))
    assert done.returncode == 1, done.stderr
    assert "this torch sees no GPU; --device cpu --small rehearses the check" in done.stdout
    written: dict[str, Any] = json.loads((tmp_path / "gpu.json").read_text())
    assert [(part["name"], part["outcome"]) for part in written["parts"]] == [("judge", FAILED)]


def test_parts_for_which_no_time_is_left_are_named(tmp_path: Path) -> None:
    done = check("--device", "cpu", "--small", "--only", "exactness", "judge", "--seconds", "5", OUT=str(tmp_path))
    assert done.returncode == 1, "exactness was not shown"
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert [(part["name"], part["outcome"]) for part in written["parts"]] == [
        ("exactness", SKIPPED),
        ("judge", SKIPPED),
    ]
    assert "s were left" in done.stdout


def test_full_sizes_on_a_cpu_are_refused(tmp_path: Path) -> None:
    done = check("--device", "cpu", OUT=str(tmp_path))
    assert done.returncode == 2
    assert "give --small, too" in done.stderr
