"""NAT's DPO trajectories as input of a training job.

The reference is the policy as it is when the job starts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

from nat_plugin_evsys.backends.base import Backend
from nat_plugin_evsys.calls import CallFate, DropReason
from nat_plugin_evsys.errors import DataError
from nat_plugin_evsys.rollouts.plain_episodes import Renderer
from nat_plugin_evsys.rollouts.preferences import PreferenceTrajectory
from nat_plugin_evsys.training.dpo import DpoSettings, Pair, build_dpo_pairs, dpo_steps, with_reference
from nat_plugin_evsys.training.job_report import Account
from nat_plugin_evsys.training.loop import Steps, Taken


class PairMaterial:
    """Preference pairs, trained with DPO.

    Args:
        trajectories: at least one.
        renderer: gives the policy's renderer; asked once the backend is loaded.
    """

    advice = "Lower learning_rate or dpo_beta"

    def __init__(
        self, trajectories: list[PreferenceTrajectory], settings: DpoSettings, renderer: Callable[[], Renderer]
    ) -> None:
        self._trajectories = trajectories
        self._settings = settings
        self._renderer = renderer
        self._pairs: list[Pair] = []
        self._origins: list[tuple[int, int]] = []
        self._trained: set[int] = set()

    async def prepare(self, backend: Backend) -> None:
        """Render the pairs and score them under the reference.

        Raises:
            DataError: a pair renders to nothing, or its two replies to the same tokens; names trajectory and item.
        """
        pairs = await asyncio.to_thread(self._render, self._renderer())
        self._pairs = await with_reference(backend, pairs)

    def steps(self, backend: Backend) -> Steps:
        """See ``dpo_steps``."""
        return dpo_steps(self._pairs, self._settings)

    def trained(self, taken: Taken) -> list[dict[str, Any]]:
        """Every pair of the step."""
        new = [index for index in taken.step.members if index not in self._trained]
        self._trained.update(new)
        return [record for index in new for record in self._records(index, taken.step.number)]

    def account(self, lost_reason: DropReason) -> Account:
        """Where every trajectory went, trained if one of its pairs was, and the recorded calls in its pairs."""
        trained = {self._origins[index][0] for index in self._trained}
        account = Account()
        for number, trajectory in enumerate(self._trajectories):
            reason = None if number in trained else lost_reason
            account.calls.calls += len(trajectory.calls)
            account.fates |= dict.fromkeys(trajectory.calls, CallFate(reason))
            if reason is None:
                account.trained_trajectories += trajectory.attempts
                account.calls.trained += len(trajectory.calls)
            else:
                account.dropped_trajectories[reason] += trajectory.attempts
                account.calls.drop(reason, len(trajectory.calls))
        return account

    def _render(self, renderer: Renderer) -> list[Pair]:
        pairs: list[Pair] = []
        for index, trajectory in enumerate(self._trajectories):
            try:
                found = build_dpo_pairs(trajectory.items, renderer.render, renderer.render_reply)
            except DataError as error:
                raise DataError(f"{trajectory.name}: {error}") from error
            self._origins += [(index, item) for item in range(len(found))]
            pairs += found
        return pairs

    def _records(self, index: int, step: int) -> Iterator[dict[str, Any]]:
        where, item = self._origins[index]
        trajectory = self._trajectories[where]
        for response, datum in zip(("chosen", "rejected"), self._pairs[index], strict=True):
            yield {
                "step": step,
                "group": trajectory.group,
                "trajectory": trajectory.position,
                "item": item,
                "response": response,
                "model_input": datum.model_input.to_ints(),
                **{name: tensor.tolist() for name, tensor in datum.loss_fn_inputs.items()},
            }
