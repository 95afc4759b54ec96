"""Measures the policies on a run's datasets, and keeps what they said."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from nat_plugin_evsys.finetuning.checks.demonstrations import PromptCheck
from nat_plugin_evsys.finetuning.run_inputs import RunInputs
from nat_plugin_evsys.report.metrics_log import BASE, VALIDATION
from nat_plugin_evsys.runs.rollouts import Collection

if TYPE_CHECKING:
    from nat_plugin_evsys.finetuning.learner import Learner
    from nat_plugin_evsys.finetuning.workflow.policy_rollouts import RolloutReport
    from nat_plugin_evsys.report.display import Display


class ScoringTrainer(Protocol):
    """What scoring needs from NAT's Trainer. Calls go through it so that a subclass's hooks take effect."""

    async def evaluate(self, name: str) -> RolloutReport:
        """Score the current policies once on each row of the run's dataset."""

    async def run_validation_evaluation(self, epoch: int, run_id: str) -> dict[str, Any]:
        """Score the current policies on the held-out dataset."""


class Scoring:
    """The rewards of the current policies, which go to their books, the display and the trackers.

    Args:
        learners: every policy under training, in the order in which their rewards are returned; what ``trainer``
            returns is about the first.
    """

    def __init__(
        self, trainer: ScoringTrainer, learners: Sequence[Learner], inputs: RunInputs, display: Display
    ) -> None:
        self._trainer = trainer
        self._learners = learners
        self._scores_training_rows = inputs.scores_training_rows
        self._has_heldout = inputs.validation_dataset is not None
        self._display = display
        self._prompt_check = PromptCheck([row["messages"] for row in inputs.demonstrations])

    async def training_rows(self, epochs_done: int) -> list[float | None]:
        """Mean rewards on the training rows, tried once each; None without ``score_training_rows``."""
        if not self._scores_training_rows:
            return [None for _ in self._learners]
        try:
            reward = (await self._trainer.evaluate("train")).mean_reward
        finally:
            await self.keep(Collection("train", epochs_done))
        return [reward, *(self._evaluation(learner).mean_reward for learner in self._learners[1:])]

    async def base(self) -> None:
        """Held-out rewards before a warm start."""
        for learner, reward in zip(
            self._learners, await self._heldout(BASE, Collection("base", 0), "of the base model"), strict=True
        ):
            learner.books.state.heldout_reward_base = reward

    async def heldout(self, epochs_done: int) -> list[float | None]:
        """Held-out rewards; None without a validation dataset."""
        when = "after the warm start" if epochs_done == 0 and self._learners[0].books.state.warm_started else None
        rewards = await self._heldout(VALIDATION, Collection("heldout", epochs_done), when)
        for learner, reward in zip(self._learners, rewards, strict=True):
            if reward is not None and epochs_done:
                learner.books.state.heldout_reward_after = reward
        return rewards

    async def keep(self, collection: Collection) -> None:
        """Keep the attempts made since the last call, and compare their prompts with the demonstrations'."""
        mismatch = self._prompt_check.compare(self._learners[0].rollouts.attempts)
        for learner in self._learners:
            await learner.keep(collection)
        if mismatch is not None:
            self._display.notice(f"WARNING: {mismatch}")

    async def _heldout(self, event: str, collection: Collection, when: str | None) -> list[float | None]:
        if not self._has_heldout:
            return [None for _ in self._learners]
        started, run_id = time.monotonic(), self._learners[0].books.run_dir.path.name
        try:
            metrics = await self._trainer.run_validation_evaluation(collection.epoch, run_id)
        finally:
            await self.keep(collection)
        seconds = round(time.monotonic() - started, 3)
        others = self._learners[1:]
        rewards = [float(metrics["avg_reward"]), *(self._evaluation(each).mean_reward for each in others)]
        counts = [metrics["num_examples"], *(len(self._evaluation(each).rewards) for each in others)]
        for learner, reward, count in zip(self._learners, rewards, counts, strict=True):
            learner.books.metrics.append(event, collection.epoch, reward=reward, num_examples=count, seconds=seconds)
            self._display.validation(collection.epoch, reward, when, learner.name if others else None)
            evaluation = learner.rollouts.evaluation
            replies = [] if evaluation is None else evaluation.replies
            learner.tracking.validation(collection.kind, collection.epoch, reward, replies)
        return list(rewards)

    @staticmethod
    def _evaluation(learner: Learner) -> RolloutReport:
        assert learner.rollouts.evaluation is not None, "the trainer has just evaluated"
        return learner.rollouts.evaluation
