"""What a run does when its policy has collapsed, as ``on_collapse`` says."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from nat_plugin_evsys.errors import CheckpointError, CollapseError
from nat_plugin_evsys.finetuning.epoch_checkpoints import EpochCheckpoints
from nat_plugin_evsys.report.findings import KEY as FINDINGS
from nat_plugin_evsys.report.findings import Finding
from nat_plugin_evsys.report.metrics_log import RELOADED
from nat_plugin_evsys.runs.state import CheckpointRecord, RunState

logger = logging.getLogger(__name__)

OnCollapse = Literal["continue", "stop", "reload_best"]

RATE_FACTOR = 0.5
"""What each reload multiplies the learning rate by: the same rate would lead to the same place."""


def collapse_of(row: Mapping[str, Any]) -> Finding | None:
    """The finding in an epoch's row that reports a collapse, or None."""
    found = (Finding.from_dict(data) for data in row.get(FINDINGS) or ())
    return next((finding for finding in found if finding.collapse), None)


def rate_after(rows: Iterable[Mapping[str, Any]]) -> float:
    """The factor on a run's learning rate after these rows of metrics.jsonl."""
    return float(RATE_FACTOR ** sum(RELOADED in row for row in rows))


async def reload_best(
    checkpoints: EpochCheckpoints, state: RunState, measured: float | None
) -> CheckpointRecord | None:
    """Load the best measured checkpoint, optimizer state included.

    Args:
        measured: reward of the present policy; None if it has none.

    Returns:
        which one; None if no checkpoint has a reward, if the best one cannot be loaded, or if the present policy has
        more than all of them.
    """
    best = state.best_measured()
    if best is None or best.reward is None:
        logger.warning("on_collapse: reload_best: no checkpoint has a reward yet, so none is loaded")
        return None
    if measured is not None and measured > best.reward:
        logger.warning(
            "on_collapse: reload_best: the policy has %.3f on held-out rows, more than any checkpoint, and goes on",
            measured,
        )
        return None
    try:
        await checkpoints.load(best)
    except CheckpointError as error:
        logger.warning(
            "on_collapse: reload_best: %s cannot be loaded, so the run goes on as it is: %s", best.name, error
        )
        return None
    return best


def stopped(finding: Finding, state: RunState) -> CollapseError:
    """The error that ends a run with ``on_collapse: stop``."""
    best = state.best_checkpoint()
    serve = "no trained checkpoint has a reward to choose by"
    if best is not None:
        serve = f"serve the best checkpoint, {best.policy} (reward {best.reward:.3f}), with `checkpoint: best`"
    return CollapseError(
        f"stopped after epoch {state.epochs_done} (on_collapse: stop). {finding.sentence} Start again with a lower "
        f"learning_rate, or {serve}"
    )
