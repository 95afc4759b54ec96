"""The shipped configs with a few settings changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from nat_process import ROOT, Finished, plugin_path, run_nat


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., Path]:
    """``make_config("tiny", change)``: a shipped config with its runs under tmp_path, after ``change(dict)``."""

    def make(name: str, change: Callable[[dict[str, Any]], None] = lambda config: None) -> Path:
        config = yaml.safe_load((ROOT / "configs" / f"{name}.yml").read_text())
        output = str(tmp_path / "runs")
        config["finetuning"]["output_dir"] = output
        for llm in config["llms"].values():
            llm["output_dir"] = output
        change(config)
        path = tmp_path / f"{name}.yml"
        path.write_text(yaml.safe_dump(config))
        return path

    return make


@pytest.fixture
def agents(tmp_path: Path) -> dict[str, str]:
    """Environment variables with which ``nat`` discovers the agents of ``tests/support``."""
    return {"PYTHONPATH": plugin_path(tmp_path / "plugins", ["raw_agents", "odd_agents"], ROOT / "tests" / "support")}


@pytest.fixture
def finetune(tmp_path: Path, make_config: Callable[..., Path], agents: dict[str, str]) -> Callable[..., Finished]:
    """``finetune(workflow, rows)``: `nat finetune` of configs/tiny.yml with another workflow, for an epoch.

    ``more`` changes the configuration further, ``changes`` the policy's.
    """

    def run(
        workflow: dict[str, Any],
        rows: list[dict[str, Any]],
        *options: str,
        more: Callable[[dict[str, Any]], object] = lambda settings: None,
        **changes: Any,
    ) -> Finished:
        def change(settings: dict[str, Any]) -> None:
            (tmp_path / "rows.json").write_text(json.dumps(rows))
            settings["workflow"] = workflow
            settings["eval"]["general"]["dataset"]["file_path"] = str(tmp_path / "rows.json")
            settings["trainer_adapters"]["adapter"]["advantage"] = "reward"  # trains every call, whatever was said
            settings["trainers"]["trainer"]["validation_dataset"] = None
            settings["trajectory_builders"]["builder"]["num_generations"] = 4
            settings["llms"]["policy"] |= changes
            more(settings)

        config = make_config("tiny", change)
        return run_nat("finetune", "--config_file", str(config), "-o", "finetuning.num_epochs", "1", *options, **agents)

    return run
