"""The scripts in examples/, run as a user runs them."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    def script(name: str) -> str:
        monkeypatch.setattr(sys, "argv", [name])
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return script


def numbers(pattern: str, text: str) -> list[float]:
    return [float(found) for found in re.findall(pattern, text)]


def test_rl_example(run) -> None:  # type: ignore[no-untyped-def]
    rewards = numbers(r"reward (\S+)", run("rl"))
    assert len(rewards) == 16
    assert rewards[-1] > rewards[0] + 0.1


def test_sft_example(run) -> None:  # type: ignore[no-untyped-def]
    out = run("sft")
    for line in ("France -> Paris", "Japan -> Tokyo", "Peru -> Lima", "Egypt -> Cairo"):
        assert line in out


def test_sdft_example(run) -> None:  # type: ignore[no-untyped-def]
    kls = numbers(r"reverse KL (\S+)", run("sdft"))
    assert len(kls) == 15
    assert kls[-1] < 0.2 * kls[0]


def test_dpo_example(run) -> None:  # type: ignore[no-untyped-def]
    losses = numbers(r"loss (\S+)", run("dpo"))
    assert losses[0] == pytest.approx(0.6931, abs=1e-4)
    assert losses[-1] < 0.05
