"""The scripts of the Weaver and Tinker documentation, with other import lines and another model name, really run.

``seed_scripts/`` holds the documentation's own lines; only functions to call the Tinker snippets in turn, and a loop
around two of them, are added.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent / "seed_scripts"

Run = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """``run(script, (name in it, name to use))``: what the script printed."""
    monkeypatch.setenv("EVSYS_HOME", str(tmp_path))

    def execute(script: str, model: tuple[str, str] | None = None) -> str:
        source = (SCRIPTS / script).read_text()
        if model is not None:
            assert f'"{model[0]}"' in source
            source = source.replace(f'"{model[0]}"', repr(model[1]))
        names: dict[str, object] = {"__name__": "__main__"}
        exec(compile(source, script, "exec"), names)
        names["service_client"].close()  # type: ignore[attr-defined]
        return capsys.readouterr().out

    return execute


def numbers(pattern: str, text: str) -> list[float]:
    return [float(found) for found in re.findall(pattern, text)]


def test_weavers_complete_training_loop(run: Run) -> None:
    losses = numbers(r"Step \d+: loss=(-?[\d.]+)", run("weaver_training_loop.txt"))
    assert len(losses) == 10
    assert all(later < earlier for earlier, later in itertools.pairwise(losses[1:]))
    assert losses[-1] < 0.5 * losses[0]


def test_weavers_sampling(run: Run) -> None:
    shown = run("weaver_sampling.txt")
    assert re.search(r"^Response: ", shown, re.M)
    (values,) = re.findall(r"Token logprobs: \[None, (.*)\]\n", shown)
    assert all(float(value) < 0 for value in values.split(", "))


def test_tinkers_examples(run: Run, tmp_path: Path, tiny_model: str) -> None:
    shown = run("tinker_examples.txt", ("Qwen/Qwen2.5-7B", tiny_model))
    losses = numbers(r"(?m)^Loss: (.*)$", shown)
    assert len(losses) == 21
    assert losses[0] == pytest.approx(losses[1])
    assert all(later < earlier for earlier, later in itertools.pairwise(losses[1:]))
    assert re.search(r"Saved to: tinker://[^/]+:train:0/weights/checkpoint-001\n", shown)
    assert re.search(r"Sampler weights saved to: tinker://[^/]+:train:0/sampler_weights/sampler-001\n", shown)
    assert f"Base model: {tiny_model}\nLoRA rank: 32\n" in shown
    assert re.search(r"Model ID: [0-9a-f-]+:train:0\n", shown)
    assert re.search(r"Sampled: \d+ at version 40\n", shown)
    (loss,) = numbers(r"Custom loss: (.*)\n", shown)
    assert f"'custom_metric': {loss}" in shown
    assert len(list(tmp_path.glob("checkpoints/*/sampler_weights/my-model/adapter_model.safetensors"))) == 1
