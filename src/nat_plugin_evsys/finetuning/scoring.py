"""Measures the policy on a run's datasets, and keeps what it said."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Protocol

from nat_plugin_evsys.finetuning.bookkeeping import RunBooks
from nat_plugin_evsys.finetuning.checks.demonstrations import PromptCheck
from nat_plugin_evsys.finetuning.rollout_keeper import RolloutKeeper
from nat_plugin_evsys.finetuning.run_inputs import RunInputs
from nat_plugin_evsys.report.metrics_log import BASE, VALIDATION
from nat_plugin_evsys.report.trackers.tracking import Tracking
from nat_plugin_evsys.runs.rollouts import Collection

if TYPE_CHECKING:
    from nat_plugin_evsys.finetuning.trajectory_builder import EvsysTrajectoryBuilder, RolloutReport
    from nat_plugin_evsys.report.display import Display


class ScoringTrainer(Protocol):
    """What scoring needs from NAT's Trainer. Calls go through it so that a subclass's hooks take effect."""

    trajectory_builder: EvsysTrajectoryBuilder

    last_evaluation: RolloutReport | None

    async def evaluate(self, name: str) -> RolloutReport:
        """Score the current policy once on each row of the run's dataset."""

    async def run_validation_evaluation(self, epoch: int, run_id: str) -> dict[str, Any]:
        """Score the current policy on the held-out dataset."""


class Scoring:
    """The rewards of the current policy, which go to the books, the display and the trackers."""

    def __init__(
        self,
        trainer: ScoringTrainer,
        books: RunBooks,
        inputs: RunInputs,
        keeper: RolloutKeeper,
        display: Display,
        tracking: Tracking,
    ) -> None:
        self._trainer = trainer
        self._books = books
        self._scores_training_rows = inputs.scores_training_rows
        self._has_heldout = inputs.validation_dataset is not None
        self._keeper = keeper
        self._display = display
        self._tracking = tracking
        self._prompt_check = PromptCheck([row["messages"] for row in inputs.demonstrations])

    async def training_rows(self, epochs_done: int) -> float | None:
        """Mean reward of the policy on the training rows, tried once each; None without ``score_training_rows``."""
        if not self._scores_training_rows:
            return None
        try:
            return (await self._trainer.evaluate("train")).mean_reward
        finally:
            await self.keep(Collection("train", epochs_done))

    async def base(self) -> None:
        """Held-out reward before a warm start."""
        reward = await self._heldout(BASE, Collection("base", 0), "of the base model")
        self._books.state.heldout_reward_base = reward

    async def heldout(self, epochs_done: int) -> float | None:
        """Held-out reward of the policy; None without a validation dataset."""
        when = "after the warm start" if epochs_done == 0 and self._books.state.warm_started else None
        reward = await self._heldout(VALIDATION, Collection("heldout", epochs_done), when)
        if reward is not None:
            self._books.state.heldout_reward_after = reward
        return reward

    async def keep(self, collection: Collection) -> None:
        """Keep the attempts made since the last call, and compare their prompts with the demonstrations'."""
        attempts = self._trainer.trajectory_builder.take_attempts()
        await self._keeper.keep(collection, attempts)
        if (mismatch := self._prompt_check.compare(attempts)) is not None:
            self._display.notice(f"WARNING: {mismatch}")

    async def _heldout(self, event: str, collection: Collection, when: str | None) -> float | None:
        if not self._has_heldout:
            return None
        started, epoch = time.monotonic(), collection.epoch
        try:
            metrics = await self._trainer.run_validation_evaluation(epoch, self._books.run_dir.path.name)
        finally:
            await self.keep(collection)
        reward, seconds = float(metrics["avg_reward"]), round(time.monotonic() - started, 3)
        self._books.metrics.append(event, epoch, reward=reward, num_examples=metrics["num_examples"], seconds=seconds)
        self._display.validation(epoch, reward, when)
        replies = [] if self._trainer.last_evaluation is None else self._trainer.last_evaluation.replies
        self._tracking.validation(collection.kind, epoch, reward, replies)
        return reward
