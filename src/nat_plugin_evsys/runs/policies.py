"""The further policies of a run: what each of them learns and says is laid out as a run of its own.

    <run>/                        the policy of ``finetuning.trainer_adapter``; its state.json commits the whole run
    <run>/policies/<name>/        a policy of ``also_train``: state.json, checkpoints/, metrics.jsonl, rollouts/, …

The folders of the others are committed before the run's own state, and brought back to it when the run is resumed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from nat_plugin_evsys.files import atomic_write
from nat_plugin_evsys.runs.directory import RunDirectory
from nat_plugin_evsys.runs.settings import redact
from nat_plugin_evsys.runs.state import RunState

POLICIES = "policies"


def policy_directory(run: RunDirectory, name: str, config: Mapping[str, Any]) -> RunDirectory:
    """The folder of a further policy, made where it is not there yet, and held by this process.

    Args:
        name: what ``llms:`` calls the policy.
        config: the run's, with the policy's own trainer adapter and reward.

    Raises:
        CheckpointError: its state, and all earlier ones, cannot be read.
        ConfigError: another process holds it.
    """
    path = run.path / POLICIES / name
    if (path / RunDirectory.STATE).is_file():
        found = RunDirectory.open(path, previous=True)
        found.lock()
        return found
    made = RunDirectory(path, RunState())
    made.checkpoints_dir.mkdir(parents=True, exist_ok=True)
    made.lock()
    atomic_write(made.config_path, yaml.safe_dump(redact(config), sort_keys=False, allow_unicode=True))
    made.save_state()
    return made


def further_policies(run: RunDirectory) -> dict[str, RunDirectory]:
    """The folders of a run's further policies by name; empty where it trains one.

    Raises:
        CheckpointError: the state of one cannot be read.
    """
    paths = sorted((run.path / POLICIES).glob(f"*/{RunDirectory.STATE}"))
    return {path.parent.name: RunDirectory.open(path.parent) for path in paths}
