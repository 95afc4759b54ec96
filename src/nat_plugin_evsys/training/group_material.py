"""Trajectory groups as input of a training job."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from tinker.types import Datum, ImageChunk

from nat_plugin_evsys.backends.base import Backend
from nat_plugin_evsys.call_images import sha256_of
from nat_plugin_evsys.calls import CallFate, CallTally, DropReason
from nat_plugin_evsys.rollouts.datums import DatumSet
from nat_plugin_evsys.rollouts.retokenized import Drift
from nat_plugin_evsys.rollouts.trajectories import TrajectoryGroup
from nat_plugin_evsys.training.fates import Learned, call_fates, learner_logprobs
from nat_plugin_evsys.training.job_report import Account
from nat_plugin_evsys.training.loop import Steps, Taken
from nat_plugin_evsys.training.policy_gradient import TrainingSettings, build_datums, policy_gradient_steps


class GroupMaterial:
    """Trajectory groups, trained with policy gradients.

    Args:
        groups: at least one.
        left_out: trajectories that came with them and cannot be trained on, by reason.
        drift: of replies that were tokenised again.
    """

    advice = "Lower learning_rate, and look for extreme rewards"

    def __init__(
        self,
        groups: list[TrajectoryGroup],
        settings: TrainingSettings,
        left_out: Counter[DropReason] | None = None,
        drift: Drift | None = None,
    ) -> None:
        self._groups = groups
        self._settings = settings
        self._left_out = Counter() if left_out is None else left_out
        self._drift = drift or Drift()
        self._sets: list[DatumSet] = []
        self._trained: set[int] = set()
        self._learned: Learned = {}

    async def prepare(self, backend: Backend) -> str | None:
        """Build the Datums."""
        self._sets = await asyncio.to_thread(build_datums, self._groups, self._settings)
        if any(datums.datums for datums in self._sets):
            return None
        dropped = sum((datums.dropped for datums in self._sets), start=Counter[DropReason]())
        reasons = ", ".join(f"{reason}: {count}" for reason, count in sorted(dropped.items())) or "there were none"
        return f"nothing to train: every call was dropped ({reasons}); the policy is unchanged"

    def steps(self, backend: Backend) -> Steps:
        """See ``policy_gradient_steps``."""
        return policy_gradient_steps(backend, self._sets, self._settings)

    def trained(self, taken: Taken) -> list[dict[str, Any]]:
        """Every group of the step."""
        members = taken.step.members
        self._learned |= learner_logprobs([self._sets[index] for index in members], taken.output)
        new = [index for index in members if index not in self._trained]
        self._trained.update(new)
        return [record for index in new for record in datum_records(self._sets[index], taken.step.number)]

    def account(self, lost_reason: DropReason) -> Account:
        """Where every call and trajectory went."""
        if lost_reason is DropReason.NOT_REACHED and self._settings.step_size.target is not None:
            lost_reason = DropReason.MOVED_TOO_FAR
        account = Account(calls=CallTally(calls=sum(group.num_calls for group in self._groups)))
        if not self._sets:
            account.calls.drop(lost_reason, account.calls.calls)
            account.dropped_trajectories[lost_reason] = sum(len(group.calls_G) for group in self._groups)
            calls = [call for group in self._groups for calls in group.calls_G for call in calls]
            account.fates = {call.key: CallFate(dropped=lost_reason) for call in calls}
        for index, datums in enumerate(self._sets):
            account.calls.dropped.update(datums.dropped)
            account.dropped_trajectories.update(datums.dropped_trajectories)
            account.fates |= call_fates(datums, self._learned, None if index in self._trained else lost_reason)
            if index in self._trained:
                account.calls.trained += datums.trained_calls
                account.trained_trajectories += datums.trained_trajectories
            elif datums.datums:
                account.calls.drop(lost_reason, datums.trained_calls)
                account.dropped_trajectories[lost_reason] += datums.trained_trajectories
        account.dropped_trajectories.update(self._left_out)
        account.figures = _figures(self._groups, self._sets) | self._retokenized()
        return account

    def _retokenized(self) -> dict[str, float]:
        """``retokenized_datums`` and ``retokenized_calls`` that were trained on, and ``drift`` where it is known."""
        trained = [origin for index in self._trained for origin in self._sets[index].provenance if origin.retokenized]
        if not trained:
            return {}
        calls = sum(span.retokenized for origin in trained for span in origin.spans)
        figures: dict[str, float] = {"retokenized_datums": len(trained), "retokenized_calls": calls}
        return figures if self._drift.share is None else figures | {"drift": self._drift.share}


def _figures(groups: Sequence[TrajectoryGroup], sets: Sequence[DatumSet]) -> dict[str, float]:
    """``groups_without_signal``: share of the groups without an advantage. ``groups_solved``: share of the groups that
    have none since they earned the highest reward, where not all did. ``groups_failed``: share of the groups whose only
    advantage is to be worse than the others. ``reply_tokens``: tokens sampled in one trajectory, on average.
    ``forced_tokens``, where decoding was constrained: those that a grammar left no choice about, which carry no loss.
    """
    trajectories = [calls for group in groups for calls in group.calls_G]
    sampled = sum(len(call.output_ids) for calls in trajectories for call in calls)
    figures = {
        "groups_without_signal": sum(datums.silent for datums in sets) / len(groups),
        "groups_solved": sum(datums.solved for datums in sets) / len(groups),
        "groups_failed": sum(datums.failed for datums in sets) / len(groups),
        "reply_tokens": sampled / max(len(trajectories), 1),
    }
    if any(call.constrained for calls in trajectories for call in calls):
        forced = sum(len(call.forced) for calls in trajectories for call in calls)
        figures["forced_tokens"] = forced / max(len(trajectories), 1)
    return figures


def datum_records(datums: DatumSet, step: int) -> Iterator[dict[str, Any]]:
    """One record per Datum, with Tinker's names: ``model_input``, ``target_tokens``, ``logprobs``, ``advantages``, …

    ``calls`` lists the calls with the rows ``start:stop`` of their sampled tokens. ``images``, where there are any, has
    the place and the hash of each; ``model_input`` has its placeholders.
    """
    for datum, origin in zip(datums.datums, datums.provenance, strict=True):
        yield {
            "step": step,
            "group": origin.group,
            "trajectory": origin.trajectory,
            "calls": [asdict(span) for span in origin.spans],
            **_input_record(datum),
            **{name: tensor.tolist() for name, tensor in datum.loss_fn_inputs.items()},
        }


def _input_record(datum: Datum) -> dict[str, Any]:
    targets = datum.loss_fn_inputs["target_tokens"].tolist()
    ids: list[int] = []
    images: list[dict[str, Any]] = []
    for chunk in datum.model_input.chunks:
        if isinstance(chunk, ImageChunk):
            images.append({"start": len(ids), "tokens": chunk.length, "sha256": sha256_of(chunk.data)})
            ids += [targets[len(ids) + chunk.length - 2]] * chunk.length  # what the token before its last one predicts
        else:
            ids += getattr(chunk, "tokens", ())  # chain_datum makes no chunks but these
    return {"model_input": ids, "images": images} if images else {"model_input": ids}
