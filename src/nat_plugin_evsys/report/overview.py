"""Everything about a run that the report's page shows at once, JSON-ready; the details are in its blocks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import yaml

from nat_plugin_evsys.report.blocks import Block
from nat_plugin_evsys.report.cost import cost
from nat_plugin_evsys.report.findings import findings_of
from nat_plugin_evsys.report.health import Health, health
from nat_plugin_evsys.report.metrics_log import EPOCH, MetricsLog, reloads
from nat_plugin_evsys.report.verdict import Row, RowRewards, curve, delivered, doubted, verdict
from nat_plugin_evsys.runs import RunDirectory
from nat_plugin_evsys.runs.environment import read_environments
from nat_plugin_evsys.runs.rollouts import Collection
from nat_plugin_evsys.runs.settings import flat_settings


def overview(
    run: RunDirectory, collections: Sequence[Collection], rewards: Callable[[Collection], RowRewards]
) -> dict[str, Any]:
    """All facts about a run.

    Args:
        collections: the kept ones.
        rewards: the rewards of a measurement by row.

    Raises:
        DataError: metrics.jsonl cannot be read.
    """
    rows = MetricsLog(run.metrics_path).rows()
    state = run.state
    findings = findings_of(rows)
    reloaded = reloads(rows)
    now = reloaded.get(state.epochs_done, state.epochs_done)
    found = verdict(state, delivered(collections, reloaded), rewards)
    return {
        "name": run.path.name,
        "path": str(run.path),
        "status": state.status,
        "error": state.error,
        "epochs": state.epochs_done,
        "verdict": asdict(doubted(found, [finding.id for finding, epochs in findings if now in epochs])),
        "curve": curve(rows, collections, rewards),
        "best_epoch": state.best_epoch,
        "reloads": reloaded,
        "cost": cost(rows, state),
        "fates": {"trained": state.trajectories["trained"], **state.trajectories["dropped"]},
        "per_epoch": [_epoch(row) for row in rows if row["event"] == EPOCH],
        "findings": [{**finding.to_dict(), "epochs": epochs} for finding, epochs in findings],
        "health": [_health(each) for each in health(rows)],
        **_setup(run),
    }


def collection_entry(collection: Collection, block: Block | None, element: str) -> dict[str, Any]:
    """A collection in the page's list.

    Args:
        block: None if there was no room for it.
        element: id of the element that holds the block.
    """
    entry = {"kind": collection.kind, "epoch": collection.epoch}
    if block is None:
        return {**entry, "element": None}
    return {**entry, "element": element, "rows": block.rows, "rollouts": block.rollouts}


def _epoch(row: Row) -> dict[str, Any]:
    job = row.get("job") or {}
    return {
        "epoch": row["epoch"],
        "reward": row.get("reward_mean"),
        "rollouts": row.get("rollouts"),
        "failed": row.get("failed_rollouts"),
        "errors": row.get("errors") or {},
        "trained": (job.get("trajectories") or {}).get("trained", 0),
        "dropped": (job.get("trajectories") or {}).get("dropped") or {},
        "seconds": row.get("seconds"),
    }


def _health(each: Health) -> dict[str, Any]:
    figure = each.figure
    return {
        "title": figure.title,
        "meaning": figure.meaning,
        "names": list(figure.names),
        "unit": figure.unit,
        "digits": figure.digits,
        "points": each.points,
        "bound": each.bound,
        "side": None if figure.threshold is None else figure.threshold.side,
        "state": each.state,
        "crossed_in": each.crossed_in,
        "crossed": figure.crossed,
    }


def _setup(run: RunDirectory) -> dict[str, Any]:
    """The settings, versions, seeds and command of the run."""
    text = run.config_path.read_text(encoding="utf-8") if run.config_path.is_file() else ""
    config: dict[str, Any] = yaml.safe_load(text) or {}
    settings = flat_settings(config)
    sessions = read_environments(run.path)
    finetuning: dict[str, Any] = config.get("finetuning") or {}
    adapter: dict[str, Any] = (config.get("trainer_adapters") or {}).get(finetuning.get("trainer_adapter")) or {}
    llms: dict[str, dict[str, Any]] = config.get("llms") or {}
    first = next((llm for llm in llms.values() if llm.get("_type") == "evsys_policy"), {})
    policy = llms.get(adapter.get("policy", ""), first)
    return {
        "model": policy.get("base_model"),
        "workflow": (config.get("workflow") or {}).get("_type"),
        "reward": (adapter.get("reward") or finetuning.get("reward_function") or {}).get("name"),
        "config": text,
        "settings": settings,
        "seeds": {name: value for name, value in settings.items() if name.endswith("seed")},
        "sessions": sessions,
        "started": sessions[0]["started"] if sessions else _created(run),
    }


def _created(run: RunDirectory) -> str:
    """When the run started, from the name of its directory."""
    parts = run.path.name.split("-")
    try:
        return time.strftime("%Y-%m-%dT%H:%M:%S", time.strptime("".join(parts[1:3]), "%Y%m%d%H%M%S"))
    except (ValueError, IndexError):
        return ""
