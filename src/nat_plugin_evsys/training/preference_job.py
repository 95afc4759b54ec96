"""The work of a job on preference pairs: NAT's DPO trajectories -> pairs -> optimizer steps -> a published version.

The loss is that of ``training/dpo.py``; the reference is the policy as it is when the job starts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tinker import types

from nat_plugin_evsys.backends.base import Backend
from nat_plugin_evsys.calls import DropReason
from nat_plugin_evsys.errors import DataError
from nat_plugin_evsys.json_lines import append_json_lines
from nat_plugin_evsys.rollouts.preferences import PreferenceTrajectory
from nat_plugin_evsys.training.dpo import Pair, build_dpo_pairs, dpo_loss, with_reference
from nat_plugin_evsys.training.job import uninterrupted
from nat_plugin_evsys.training.job_report import Account, JobReport
from nat_plugin_evsys.training.schedule import count_steps, epoch_batches
from nat_plugin_evsys.training.step import take_step, watched
from nat_plugin_evsys.training.step_metrics import StepMetrics

ADVICE = "Lower learning_rate or dpo_beta, or set grad_clip_norm"


class Renderer(Protocol):
    """Messages -> token ids, by the model's chat template."""

    def render(self, messages: Any, tools: Any) -> list[int]:
        """Ids of a prompt, ending with the opening of an assistant turn."""
        ...

    def render_reply(self, message: Any) -> list[int]:
        """Ids of an assistant reply, with the end-of-turn token."""
        ...


@dataclass(frozen=True, slots=True)
class PreferenceSettings:
    """How pairs are trained on.

    Attributes:
        adam: of every optimizer step; the learning rate is constant.
        beta: how much a departure from the reference costs.
        batch_size: pairs of one optimizer step.
        passes: times that the pairs are trained on.
        shuffle_key: decides the order of the pairs in each pass.
    """

    adam: types.AdamParams
    beta: float = 0.1
    batch_size: int = 8
    passes: int = 1
    shuffle_key: str = "0"


@dataclass(frozen=True, slots=True)
class _Example:
    """A pair and the index of the trajectory that it came from; ``item`` is its position therein."""

    trajectory: int
    item: int
    pair: Pair

    @property
    def tokens(self) -> int:
        return sum(datum.model_input.length for datum in self.pair)

    @property
    def reply_tokens(self) -> int:
        return sum(int(sum(datum.loss_fn_inputs["weights"].tolist())) for datum in self.pair)


class PreferenceWork:
    """Trains a backend on preference pairs with DPO.

    Args:
        trajectories: at least one.
        backend: gives the loaded backend.
        renderer: gives the policy's renderer; asked once the backend is loaded.
        publish: makes the present weights the next served policy version and returns its number.
        datum_log: where every trained Datum is written, if anywhere.
    """

    def __init__(
        self,
        trajectories: list[PreferenceTrajectory],
        settings: PreferenceSettings,
        backend: Callable[[], Awaitable[Backend]],
        renderer: Callable[[], Renderer],
        publish: Callable[[], Awaitable[int]],
        datum_log: Path | None = None,
    ) -> None:
        self._trajectories = trajectories
        self._settings = settings
        self._loss = dpo_loss(settings.beta)
        self._open_backend = backend
        self._renderer = renderer
        self._publish = publish
        self.datum_log = datum_log
        self._trained: set[int] = set()
        self._logged: set[tuple[int, int]] = set()
        self._history: list[StepMetrics] = []

    async def run(self, report: JobReport) -> None:
        """Render the pairs, score them under the reference, take every optimizer step, publish.

        A cancellation lets the forward_backward + optim_step pair at work finish, so no half-accumulated gradient is
        left in the backend; what was trained until then is not published.

        Raises:
            DataError: a pair renders to nothing, or its two replies to the same tokens; names trajectory and item.
            JobError: the loss is not finite.
        """
        settings = self._settings
        report.enter("preparing")
        backend = await self._open_backend()
        examples = await asyncio.to_thread(self._examples, self._renderer())
        report.steps = count_steps(len(examples), settings.passes, settings.batch_size)
        examples = await _referenced(backend, examples)
        report.beat()
        total = settings.passes * sum(example.tokens for example in examples)
        batches = epoch_batches(examples, settings.passes, settings.batch_size, settings.shuffle_key)
        for number, (_, batch) in enumerate(batches, start=1):
            report.step = number
            await uninterrupted(self._step(backend, batch, report, total))
        report.enter("publishing")
        await uninterrupted(self._publish_to(report))

    def account(self, lost_reason: DropReason) -> Account:
        """Where every trajectory went, trained if one of its pairs was; there are no calls. See ``Work``."""
        account = Account(trained_trajectories=len(self._trained))
        if lost := len(self._trajectories) - len(self._trained):
            account.dropped_trajectories[lost_reason] = lost
        return account

    def _examples(self, renderer: Renderer) -> list[_Example]:
        examples = []
        for index, trajectory in enumerate(self._trajectories):
            try:
                pairs = build_dpo_pairs(trajectory.items, renderer.render, renderer.render_reply)
            except DataError as error:
                raise DataError(f"{trajectory.name}: {error}") from error
            examples += [_Example(index, item, pair) for item, pair in enumerate(pairs)]
        return examples

    async def _step(self, backend: Backend, batch: list[_Example], report: JobReport, total: int) -> None:
        data = [datum for example in batch for datum in example.pair]
        await take_step(
            backend,
            report,
            self._history,
            lambda advance: watched(backend.forward_backward_custom_async(data, self._loss), backend, advance),
            self._settings.adam,
            tokens=sum(example.tokens for example in batch),
            sampled_tokens=sum(example.reply_tokens for example in batch),
            total_tokens=total,
            advice=ADVICE,
            mean_over=len(batch),
        )
        self._trained.update(example.trajectory for example in batch)
        await self._log_datums(batch, report.step)

    async def _publish_to(self, report: JobReport) -> None:
        report.policy_version = await self._publish()

    async def _log_datums(self, batch: list[_Example], step: int) -> None:
        """Each pair once, at the first step that trained it."""
        new = [example for example in batch if (example.trajectory, example.item) not in self._logged]
        if self.datum_log is not None and new:
            self._logged.update((example.trajectory, example.item) for example in new)
            records = [record for example in new for record in self._records(example, step)]
            await asyncio.to_thread(append_json_lines, self.datum_log, records)

    def _records(self, example: _Example, step: int) -> Iterator[dict[str, Any]]:
        trajectory = self._trajectories[example.trajectory]
        for response, datum in zip(("chosen", "rejected"), example.pair, strict=True):
            yield {
                "step": step,
                "group": trajectory.group,
                "trajectory": trajectory.position,
                "item": example.item,
                "response": response,
                "model_input": datum.model_input.to_ints(),
                **{name: tensor.tolist() for name, tensor in datum.loss_fn_inputs.items()},
            }


async def _referenced(backend: Backend, examples: list[_Example]) -> list[_Example]:
    pairs = await with_reference(backend, [example.pair for example in examples])
    return [_Example(example.trajectory, example.item, pair) for example, pair in zip(examples, pairs, strict=True)]
