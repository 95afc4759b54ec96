"""A run directory without a run: real files, written by the code that writes them, of attempts that a test makes up."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nat_plugin_evsys.calls import Call, CallFate, CallKey, DropReason
from nat_plugin_evsys.finetuning.replies import reply_of
from nat_plugin_evsys.finetuning.rollout_keeper import RolloutKeeper
from nat_plugin_evsys.report.diagnosis import EpochFacts, diagnose
from nat_plugin_evsys.report.metrics_log import EPOCH, RELOADED, VALIDATION, MetricsLog
from nat_plugin_evsys.rollouts.attempts import Attempt
from nat_plugin_evsys.runs import RunDirectory
from nat_plugin_evsys.runs.environment import add_environment
from nat_plugin_evsys.runs.rollouts import Collection, CollectionKind

END = "<|im_end|>"


class MadeRun:
    """A run that grows epoch by epoch.

    Args:
        config: its settings, beside those that every run has.
    """

    def __init__(self, output_dir: Path, **config: Any) -> None:
        policy = {"_type": "evsys_policy", "base_model": "builtin/tiny", "seed": 7, "api_key": "sk-very-secret-value-1"}
        self.run_dir = RunDirectory.create(
            output_dir,
            {
                "llms": {"policy": policy},
                "workflow": {"_type": "chat_completion"},
                "finetuning": {"reward_function": {"name": "right_team"}},
                **config,
            },
        )
        self.metrics = MetricsLog(self.run_dir.metrics_path)
        self._words: dict[str, int] = {}
        self._numbers = itertools.count()
        self._keeper = RolloutKeeper(
            self.run_dir.rollouts,
            lambda token: {number: word for word, number in self._words.items()}[token].encode(),
            rows=None,
            session=self.run_dir.path.name,
            agent="chat_completion",
            model="builtin/tiny",
        )
        add_environment(self.run_dir.path)

    @property
    def path(self) -> Path:
        return self.run_dir.path

    def attempt(self, row: str, reply: str, reward: float | None, number: int = 0, **fields: Any) -> Attempt:
        """An attempt of one call whose tokens are the words of ``reply``; ``fields`` are those of Attempt."""
        question = fields.pop("question", f"Question {row}?")
        words = [word if index == 0 else f" {word}" for index, word in enumerate(reply.split(" "))]
        ids = [self._words.setdefault(word, len(self._words)) for word in [*words, END]]
        call = Call(
            call_id=f"chatcmpl-{next(self._numbers)}",
            index=0,
            run_id="run",
            step_id=None,
            policy_version=3,
            prompt_ids=[1, 2, 3],
            output_ids=ids,
            logprobs=[-0.5] * len(ids),
            stop_reason="stop",
            temperature=1.0,
            top_p=1.0,
            messages=fields.pop("messages", [{"role": "user", "content": question}]),
            tools=[],
            reply={"role": "assistant", "content": reply},
            sequence=next(self._numbers),
        )
        defaults: dict[str, Any] = {
            "lost": None,
            "error": None,
            "question": question,
            "expected": "the answer",
            "output": reply,
            "reasoning": {"mode": "exact"},
            "seconds": 0.5,
        }
        return Attempt(row, f"{row}/{number}", [call], reward, number=number, **(defaults | fields))

    def measure(self, epochs: int, attempts: Sequence[Attempt], kind: CollectionKind = "heldout") -> None:
        """Held-out (or training) rows, tried once each by the policy that has ``epochs`` behind it."""
        self._keep(Collection(kind, epochs), attempts, {})
        rewards = [attempt.reward or 0.0 for attempt in attempts]
        mean = sum(rewards) / len(rewards)
        when = "before" if epochs == 0 else "after"
        if kind == "train":
            setattr(self.run_dir.state, f"train_reward_{when}", mean)
        else:
            setattr(self.run_dir.state, f"heldout_reward_{when}", mean)
            self.metrics.append(VALIDATION, epochs, reward=mean, num_examples=len(rewards), seconds=1.0)
        self.run_dir.save_state()

    def train(
        self, epoch: int, groups: Sequence[Sequence[Attempt]], *, reloaded: str | None = None, **metrics: float
    ) -> None:
        """An epoch: groups without a difference are dropped, of the others each token's probability grows by 10 %.

        Args:
            reloaded: the checkpoint that was loaded after it.
        """
        attempts = [attempt for group in groups for attempt in group]
        fates: dict[CallKey, CallFate] = {}
        for group in groups:
            fates |= _fates(group)
        self._keep(Collection("epoch", epoch), attempts, fates)
        rewards = [attempt.reward for attempt in attempts if attempt.reward is not None]
        trained = sum(fate.dropped is None for fate in fates.values())
        facts = EpochFacts(epoch, [reply_of(attempt) for attempt in attempts], trained, last_trained=epoch - 1)
        job_metrics = {"sampled_tokens": 10 * trained, "steps": 4, "entropy:mean": 0.7, "kl_v1:mean": 0.01, **metrics}
        dropped = {DropReason.ZERO_VARIANCE_GROUP: len(fates) - trained}
        self.metrics.append(
            EPOCH,
            epoch,
            reward_mean=sum(rewards) / len(rewards),
            reward_min=min(rewards),
            reward_max=max(rewards),
            reward_std=0.3,
            rollouts=len(attempts),
            failed_rollouts=sum(attempt.error is not None for attempt in attempts),
            errors={},
            calls=len(attempts),
            staleness={"0": len(attempts)},
            trained=trained,
            rollout_seconds=3.0,
            training_seconds=1.0,
            job={"metrics": job_metrics, "trajectories": {"trained": trained, "dropped": dropped}},
            replies=facts.numbers.to_dict(),
            findings=[finding.to_dict() for finding in diagnose(facts)],
            **({} if reloaded is None else {RELOADED: reloaded}),
        )
        state = self.run_dir.state
        state.epochs_done = epoch
        state.seconds += 5.0
        self.run_dir.save_state()

    def finish(self) -> RunDirectory:
        """The run is done."""
        self.run_dir.state.status = "finished"
        self.run_dir.save_state()
        self.run_dir.unlock()
        return self.run_dir

    def _keep(self, collection: Collection, attempts: Sequence[Attempt], fates: dict[CallKey, CallFate]) -> None:
        self._keeper.write(collection, attempts, fates, {})


def _fates(group: Sequence[Attempt]) -> dict[CallKey, CallFate]:
    scored = [attempt for attempt in group if attempt.reward is not None]
    rewards = [attempt.reward or 0.0 for attempt in scored]
    if len(set(rewards)) < 2:
        return {attempt.calls[0].key: CallFate(DropReason.ZERO_VARIANCE_GROUP) for attempt in scored}
    mean = sum(rewards) / len(rewards)
    return {
        attempt.calls[0].key: CallFate(
            # as if a grammar had left nothing but the end of the reply
            None,
            (attempt.reward or 0.0) - mean,
            [*(logprob + 0.1 for logprob in attempt.calls[0].logprobs[:-1]), None],
        )
        for attempt in scored
    }
