"""The progress display: live on a terminal, plain lines in a pipe, or nothing.

Everything goes to stderr, so that stdout has only the summary.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from nat_plugin_evsys.report.findings import Finding, finding_text

if TYPE_CHECKING:
    from nat.data_models.finetuning import TrainingJobStatus

logger = logging.getLogger(__name__)

Mode = Literal["auto", "rich", "plain", "none"]


class Display:
    """The display's contract; this one shows nothing. Cheap to call often: a display decides what to draw."""

    def phase(self, name: str, detail: str = "") -> None:
        """A new phase starts, e.g. ``phase("rollouts", "epoch 2/4")``."""

    def rollouts(self, done: int, total: int) -> None:
        """How many rollouts of this phase have ended."""

    def steps(self, done: int, total: int, note: str = "") -> None:
        """How many optimizer steps of this phase are done."""

    def job(self, status: TrainingJobStatus) -> None:
        """The progress of the training job."""

    def epoch_done(self, epoch: int, epochs: int, row: Mapping[str, Any]) -> None:
        """An epoch has ended.

        Args:
            epoch: counted from 1.
            epochs: how many there are.
            row: its row of metrics.jsonl.
        """

    def validation(self, epoch: int, reward: float, when: str | None = None, policy: str | None = None) -> None:
        """The held-out reward after ``epoch`` epochs (0: before training), or at the time that ``when`` names.

        Args:
            policy: whose it is, if the run trains several.
        """

    def notice(self, text: str) -> None:
        """Something that a person should look at. Always shown: without a display it is logged as a warning."""
        logger.warning(text)

    def finding(self, finding: Finding) -> None:
        """What is wrong with the run."""
        self.notice(finding_text(finding))

    def close(self) -> None:
        """Leave the terminal as it was found. May be called twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
