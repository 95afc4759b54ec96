"""The shipped configs with a few settings changed."""

from __future__ import annotations

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
