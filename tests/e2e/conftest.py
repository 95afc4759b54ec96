"""The shipped configs with a few settings changed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from nat_process import ROOT


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
    """Environment variables with which ``nat`` discovers the functions of ``tests/support/raw_agents.py``."""
    installed = tmp_path / "plugins" / "raw_agents-0.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: raw_agents\nVersion: 0\n")
    (installed / "entry_points.txt").write_text("[nat.plugins]\nraw_agents = raw_agents\n")
    path = [str(installed.parent), str(ROOT / "tests" / "support"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(path)}
