"""An epoch of ``nat finetune`` on eight rows of the help desk, whatever the workflow: every answer has reward 1."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from exchanges import Checked, check_token_exact
from nat_process import CAPTURE_DIR, ROOT, Finished, newest_run, plugin_path, run_nat

ROWS, ATTEMPTS = 8, 4


def write_config(
    directory: Path,
    workflow: dict[str, Any],
    functions: dict[str, Any] | None = None,
    demonstrations: list[dict[str, Any]] | None = None,
    warm_start: Mapping[str, Any] | None = None,
    **policy: Any,
) -> Path:
    """configs/helpdesk_tools.yml with another workflow, for one epoch whose Datums are kept.

    Args:
        functions: beside ``route_ticket``.
        demonstrations: what the toy model is shown first; None is nothing.
        warm_start: its other settings.
        policy: settings of the policy.
    """
    config: dict[str, Any] = yaml.safe_load((ROOT / "configs" / "helpdesk_tools.yml").read_text())
    config["workflow"] = workflow
    config["functions"] |= functions or {}
    rows = json.loads((ROOT / config["eval"]["general"]["dataset"]["file_path"]).read_text())[:ROWS]
    (directory / "rows.json").write_text(json.dumps([{**row, "answer": "^"} for row in rows]))
    config["eval"]["general"]["dataset"]["file_path"] = str(directory / "rows.json")
    config["eval"]["general"]["max_concurrency"] = ROWS
    config["eval"]["evaluators"]["right_desk"]["mode"] = "regex"  # "^" is in whatever is said
    config["llms"]["policy"] |= {"output_dir": str(directory / "runs"), **policy}
    config["trajectory_builders"]["builder"] |= {"num_generations": ATTEMPTS, "rows_per_epoch": None}
    config["trainer_adapters"]["adapter"] |= {"save_datums": True, "advantage": "reward"}
    trainer = config["trainers"]["trainer"]
    trainer["validation_dataset"] = None
    if demonstrations is None:
        del trainer["warm_start"]
    else:
        (directory / "demonstrations.json").write_text(json.dumps(demonstrations))
        trainer["warm_start"] |= {"demonstrations": str(directory / "demonstrations.json"), **(warm_start or {})}
    config["finetuning"] |= {"num_epochs": 1, "output_dir": str(directory / "runs")}
    path = directory / "config.yml"
    path.write_text(yaml.safe_dump(config))
    return path


def finetune(config: Path, python: Path | None = None, **env: str) -> Finished:
    """`nat finetune`; what it sends to the policy is captured, and NAT finds the workflows of ``interop``."""
    directory = config.parent
    return run_nat(
        "finetune",
        "--config_file",
        str(config),
        timeout=1500,
        python=python,
        PYTHONPATH=plugin_path(directory / "plugins", ["framework_agents"], CAPTURE_DIR, ROOT / "interop"),
        EVSYS_TEST_HTTP_CAPTURE=str(directory / "http.jsonl"),
        **env,
    )


def check_trained(done: Finished, directory: Path) -> Checked:
    """Assert that the run trained on exactly its calls, sampled at the policy's temperature, and print the figures."""
    assert done.code == 0, done.text[-6000:]
    checked = check_token_exact(directory / "http.jsonl", newest_run(directory))
    summary = checked.summary
    print(f"{directory.name}: {summary['calls']} calls, {summary['trained']} trained, dropped {summary['dropped']}")
    assert summary["trained"] > 0
    assert {exchange.temperature for exchange in checked.exchanges} == {None}
    outputs_of: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for exchange in checked.exchanges:
        outputs_of.setdefault(tuple(exchange.prompt), set()).add(tuple(exchange.output))
    assert any(len(outputs) > 1 for outputs in outputs_of.values()), "the rollouts were sampled greedily"
    return checked
