"""Acceptance: what is trained on is, id for id, what went over the wire, for agents that stream and call tools."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from exchanges import check_token_exact
from nat_process import CAPTURE_DIR, ROOT, first_rows, newest_run, run_nat


@pytest.mark.parametrize(
    ("name", "workflow", "streaming"),
    [
        ("helpdesk_tools", "tool_calling_agent", False),
        ("helpdesk_tools", "tool_calling_agent", True),
        ("react", "react_agent", True),
    ],
)
def test_trained_tokens_are_the_tokens_on_the_wire(
    name: str, workflow: str, streaming: bool, tmp_path: Path, make_config: Callable[..., Path]
) -> None:
    held_out: list[Path] = []

    def change(config: dict[str, Any]) -> None:
        assert config["workflow"]["_type"] == workflow
        config["llms"]["policy"]["disable_streaming"] = not streaming
        config["trajectory_builders"]["builder"]["num_generations"] = 4
        config["trainer_adapters"]["adapter"]["save_datums"] = True
        config["trainers"]["trainer"]["validation_interval"] = 1
        held_out.append(ROOT / config["trainers"]["trainer"].pop("validation_dataset"))

    config = make_config(name, change)
    settings = yaml.safe_load(config.read_text())
    train = ROOT / settings["eval"]["general"]["dataset"]["file_path"]
    capture = tmp_path / "http.jsonl"
    done = run_nat(
        "finetune",
        "--config_file",
        str(config),
        "--dataset",
        str(first_rows(train, 6, tmp_path / "train.json")),
        "--validation_dataset",
        str(first_rows(held_out[0], 3, tmp_path / "heldout.json")),
        "-o",
        "finetuning.num_epochs",
        "2",
        PYTHONPATH=str(CAPTURE_DIR),
        EVSYS_TEST_HTTP_CAPTURE=str(capture),
    )
    assert done.code == 0, done.text[-4000:]
    assert "RecursionError" not in done.text

    checked = check_token_exact(capture, newest_run(tmp_path))
    assert any(exchange.streamed for exchange in checked.exchanges) == streaming
    assert all(exchange.run_id for exchange in checked.exchanges)
    if workflow == "tool_calling_agent":
        assert any(len(datum["calls"]) > 1 for datum in checked.datums), "no two turns of an episode were merged"
