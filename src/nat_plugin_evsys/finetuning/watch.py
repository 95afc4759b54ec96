"""Checks every finished epoch and reports what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from nat_plugin_evsys.finetuning.workflow.policy_rollouts import RolloutReport
from nat_plugin_evsys.report.diagnosis import EpochFacts, diagnose
from nat_plugin_evsys.report.findings import KEY as FINDINGS
from nat_plugin_evsys.report.findings import Finding, findings_of
from nat_plugin_evsys.report.metrics_log import RELOADED, MetricsLog
from nat_plugin_evsys.report.replies import KEY as REPLIES
from nat_plugin_evsys.report.replies import ReplyNumbers


class Watch:
    """A run's epochs as metrics.jsonl has them, so that a resumed run repeats no finding.

    Args:
        can_reload: see ``EpochFacts``.
    """

    def __init__(self, metrics: MetricsLog, *, can_reload: bool = False) -> None:
        self._metrics = metrics
        self._can_reload = can_reload

    def look(
        self, epoch: int, report: RolloutReport, job: Mapping[str, Any], heldout: RolloutReport | None
    ) -> tuple[dict[str, Any], list[Finding]]:
        """An epoch's figures of its replies, and the findings that are new.

        Args:
            epoch: counted from 1; the rows of the epochs before are in metrics.jsonl.
            job: of the epoch's row: what its training job trained on, and its metrics.
            heldout: the validation after the epoch, if there was one.
        """
        rows = self._metrics.epochs()
        known = [(numbers, row) for row in rows if (numbers := ReplyNumbers.of_row(row)) is not None]
        facts = EpochFacts(
            epoch=epoch,
            replies=report.replies,
            trained=int(job.get("trained", 0)),
            heldout=() if heldout is None else heldout.replies,
            before=[numbers for numbers, _ in known],
            reloaded_after=max((count for count, (_, row) in enumerate(known, 1) if RELOADED in row), default=0),
            can_reload=self._can_reload,
            last_trained=max((row["epoch"] for row in rows if row.get("trained")), default=0),
            entropies=_entropies([*(row.get("job") or {} for row in rows), job]),
            metrics=job.get("metrics") or {},
            epochs_per_pass=report.epochs_per_pass,
        )
        found = diagnose(facts)
        said = {finding.id for finding, _ in findings_of(rows)}
        columns = {REPLIES: facts.numbers.to_dict(), FINDINGS: [finding.to_dict() for finding in found]}
        return columns, [finding for finding in found if finding.id not in said]


def _entropies(jobs: Iterable[Mapping[str, Any]]) -> list[float]:
    metrics = ((job.get("metrics") or {}) for job in jobs)
    return [each["entropy:mean"] for each in metrics if "entropy:mean" in each]
