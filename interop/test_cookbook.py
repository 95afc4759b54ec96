"""Programs of tinker-cookbook, unmodified, in an environment of their own, train on ``nat evsys serve``.

Most of them SmolLM2-135M. What each prints is in docs/interop.md.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import cookbook_data
import pytest
from cookbook_programs import PROGRAMS, Program, Steps, falls, series
from other_environment import python_with
from serve_process import ServerProcess, start_server

from nat_plugin_evsys.engine.model.builtin import ensure_builtin

VERSION = "0.6.1"
COOKBOOK = f"tinker-cookbook=={VERSION}"
# What it imports; its own list also names tml-renderers>=0.4.1, which only other models' renderers use.
NEEDS = (
    "aiohttp",
    "blobfile",
    "chz",
    "datasets",
    "math-verify",
    "pylatexenc",
    "pyrage",
    "sympy",
    "termcolor",
    "tabulate",
)
SKYRLS_MODEL = "Qwen/Qwen3-4B-Instruct-2507"
"""What SkyRL's pages train: the loops take a renderer by the name. Here it is a directory with SmolLM2, whose chat
format is the same."""
BUILD = ("hatchling", "hatch-vcs")
"""What pip wants for the source archive, which alone has the cookbook's scripts."""


@dataclass
class Cookbook:
    """The environment of the programs, the directory that they run in, and what they have reported."""

    python: Path
    directory: Path
    models: dict[str, Path]
    url: str
    steps: dict[str, Steps] = field(default_factory=dict)

    def run(self, *arguments: str, timeout: int = 900) -> str:
        """What a program printed."""
        settings = {"TINKER_BASE_URL": self.url, "TINKER_API_KEY": "tml-local", "TINKER_TELEMETRY": "0"}
        done = subprocess.run(
            [str(self.python), "-W", "ignore", *arguments],
            cwd=self.directory,
            env={**os.environ, "HF_HUB_OFFLINE": "1", **settings},
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        return done.stdout

    def report(self, program: Program) -> Steps:
        """The metrics of a program, which runs once, after the one that it starts from."""
        if program.name not in self.steps:
            log = self.directory / "logs" / (program.resumes or program.name)
            options = {
                "model_name": self.models[program.model],
                "renderer_name": program.renderer,
                "log_path": log,
                "behavior_if_log_dir_exists": "resume" if program.resumes else "delete",
                **program.common,
                **program.options,
            }
            if program.name == "on_policy_distillation":
                options["teacher_model"] = self.models[program.model]
            for before in (program.resumes, program.checkpoint and program.checkpoint[1]):
                if before:
                    self.report(next(each for each in PROGRAMS if each.name == before))
            if program.checkpoint:
                option, before, kind = program.checkpoint
                options[option] = read_lines(self.directory / "logs" / before / "checkpoints.jsonl")[-1][kind]
            self.run("-m", f"tinker_cookbook.{program.module}", *(f"{name}={value}" for name, value in options.items()))
            self.steps[program.name] = read_lines(log / "metrics.jsonl")
        return self.steps[program.name]


def read_lines(path: Path) -> Steps:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("cookbook")
    cookbook_data.write(made)
    return made


@pytest.fixture(scope="module")
def models(directory: Path) -> dict[str, Path]:
    """By name. The SDK takes an absolute path of more than two slashes for a directory, not for a hub's id."""
    found = {"tiny": ensure_builtin("builtin/tiny", directory / "models")}
    found["smollm2"] = ensure_builtin("builtin/smollm2-135m", directory / "models")
    named = directory / SKYRLS_MODEL
    named.parent.mkdir()
    named.symlink_to(found["smollm2"])
    return {name: Path(path) for name, path in found.items()}


@pytest.fixture(scope="module")
def server(directory: Path, models: dict[str, Path]) -> Iterator[ServerProcess]:
    with contextlib.chdir(directory):  # where SKYRLS_MODEL is a model's directory, for the server as for its clients
        process = start_server(models["smollm2"], directory / "store", "--base-model", str(models["tiny"]))
    yield process
    process.stop()


@pytest.fixture(scope="module")
def cookbook(directory: Path, models: dict[str, Path], server: ServerProcess) -> Cookbook:
    # torch, transformers and the SDK are those of the project: installed once
    return Cookbook(python_with("interop-cookbook", (*NEEDS, *BUILD), (COOKBOOK,)), directory, models, server.url)


@pytest.fixture(scope="module")
def scripts(cookbook: Cookbook) -> Path:
    """The scripts that are only in the cookbook's source archive."""
    pip = ("-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-build-isolation")
    cookbook.run(*pip, "--no-binary", ":all:", COOKBOOK)
    name = f"tinker_cookbook-{VERSION}"
    shutil.unpack_archive(cookbook.directory / f"{name}.tar.gz", cookbook.directory)
    return cookbook.directory / name / "tests"


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_it_trains(cookbook: Cookbook, program: Program) -> None:
    print(f"{program.name}: {program.check(cookbook.report(program))}")


def skyrls_loop(cookbook: Cookbook, name: str, log: str, **options: object) -> Steps:
    """A command of SkyRL's pages; the options are those of the pages, and what keeps it short."""
    given = {"base_url": cookbook.url, "model_name": SKYRLS_MODEL, "log_path": cookbook.directory / "logs" / log}
    arguments = (f"{option}={value}" for option, value in {**given, **options}.items())
    cookbook.run("-m", f"tinker_cookbook.recipes.{name}", *arguments, timeout=1500)
    return read_lines(cookbook.directory / "logs" / log / "metrics.jsonl")


@pytest.mark.timeout(1800)
def test_skyrls_two_supervised_clients_at_once(cookbook: Cookbook) -> None:
    options = {"train_on_what": "LAST_ASSISTANT_MESSAGE", "lora_rank": 32, "batch_size": 8, "learning_rate": 1e-3}
    with ThreadPoolExecutor() as clients:
        runs = [clients.submit(skyrls_loop, cookbook, "sl_loop", f"sl_loop_{each}", **options) for each in "ab"]
    for run in runs:
        print(f"sl_loop: {falls(run.result(), 'train_mean_nll', 0.8, 8)}")


@pytest.mark.timeout(1800)
def test_skyrls_rl_client(cookbook: Cookbook) -> None:
    """With the loss of SkyRL's pages: the default of newer releases, stable_reinforce, is refused by name."""
    size = {"batch_size": 8, "group_size": 8, "max_tokens": 24, "learning_rate": 5e-4, "max_steps": 8}
    steps = skyrls_loop(cookbook, "rl_loop", "rl_loop", loss_fn="importance_sampling", **size)
    rewards = series(steps, "reward/total")
    assert len(rewards) == 8
    assert max(rewards[-3:]) > rewards[0] + 0.05
    print(f"rl_loop: reward/total {' '.join(f'{reward:.3f}' for reward in rewards)}")


WITH_A_LOCAL_TEXT = """
import pathlib, runpy, sys
import httpx
_, script, text, *sys.argv[1:] = sys.argv
httpx.get = lambda url: httpx.Response(200, text=pathlib.Path(text).read_text(), request=httpx.Request("GET", url))
runpy.run_path(script, run_name="__main__")
"""
"""Runs a script that downloads one text; only the download is replaced."""


@pytest.mark.timeout(900)
def test_sampler_and_trainer_agree_on_a_text(cookbook: Cookbook, scripts: Path) -> None:
    text = cookbook.directory / "text.py"
    text.write_text(Path(cookbook_data.__file__).read_text())
    script = str(scripts / "compare_sampling_training_logprobs.py")
    shown = cookbook.run("-c", WITH_A_LOCAL_TEXT, script, str(text), f"model_names={cookbook.models['smollm2']}")
    assert "ERROR: Timeout" not in shown, "the script gives each model 300 s"
    (error,) = (float(found) for found in re.findall(r"'mse\[sample, train\]': (\S+),", shown))
    assert error < 1e-6
    print(f"compare_sampling_training_logprobs: mse[sample, train] {error:.1e}")


@pytest.mark.timeout(900)
def test_logprobs_scale_with_the_temperature(cookbook: Cookbook, scripts: Path) -> None:
    """At a temperature the log-ratio of two tokens is that at 1, divided by the temperature."""
    shown = cookbook.run(str(scripts / "validate_temperature_logprobs.py"), f"base_model={cookbook.models['smollm2']}")
    rows = re.findall(r"^ +([\d.]+) +\d+ +(\d+) +[\d.]+ +([\d.]+)$", shown, flags=re.M)
    apart = [float(furthest) for temperature, pairs, furthest in rows if int(pairs) and float(temperature) > 1]
    assert len(apart) == 3
    assert max(apart) < 1e-3
    print(f"validate_temperature_logprobs: {max(apart):.1e} at most")
