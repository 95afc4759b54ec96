"""The one training loop: forward_backward, a check of the loss, AdamW, next step.

An algorithm is an async generator of ``Step``s. It is asked for a step only when the one before has been taken, so what
it samples or computes meanwhile sees the weights of that one; ``taken = yield step`` gives it the result of the step.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from tinker import Datum, types

from nat_plugin_evsys.backends.base import Backend, LossCallable
from nat_plugin_evsys.errors import JobError
from nat_plugin_evsys.training.job_report import JobReport
from nat_plugin_evsys.training.step_metrics import StepMetrics, summarize
from nat_plugin_evsys.training.uninterrupted import uninterrupted

POLL_SECONDS = 0.2
"""How often a backend is asked how far its forward_backward is."""

STEPS_SHARE = 98.0
"""Progress when all optimizer steps are done; publishing is the rest."""


@dataclass(frozen=True, slots=True)
class NamedLoss:
    """One of Tinker's losses, with its settings by Tinker's names."""

    name: types.LossFnType
    config: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """What one optimizer step trains on, and how.

    Attributes:
        data: the gradient is that of the *sum* of the loss over all of these.
        loss: by name, or a function of the learner's logprobs.
        adam: values of this step.
        number: from 1 to ``total``.
        total: steps of the whole training.
        epoch: pass over the material, from 1.
        members: positions of what ``data`` was made from, in the algorithm's material.
        sampled_tokens: tokens of ``data`` that are trained on.
        mean_over: how many things the backend's means are over; see StepMetrics.
        share: this step's share of the whole training, 0 to 1.
        policy_version: the version that ``data`` was sampled from, if one did.
        normalized: whether ``data`` is scaled so that the loss is no plain sum over tokens.
        moved: how far the policy has moved, in nats a token, by the step's forward_backward; None if it does not say.
        most_kl: the step is refused if ``moved`` is above this; None: never.
        measured: figures that were computed on the way to the step.
    """

    data: list[Datum]
    loss: NamedLoss | LossCallable
    adam: types.AdamParams
    number: int
    total: int
    epoch: int = 1
    members: tuple[int, ...] = ()
    sampled_tokens: int = 0
    mean_over: int | None = None
    share: float = 0.0
    policy_version: int | None = None
    normalized: bool = False
    moved: Callable[[types.ForwardBackwardOutput], float | None] | None = None
    most_kl: float | None = None
    measured: dict[str, float] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Rows of all Datums together."""
        return sum(datum.model_input.length for datum in self.data)


@dataclass(frozen=True, slots=True)
class Taken:
    """A step that has been taken: its forward_backward's output, and the metrics of that and of the optimizer step.

    If ``refused``, there was no optimizer step: the policy had ``moved`` too far.
    """

    step: Step
    output: types.ForwardBackwardOutput
    metrics: StepMetrics
    moved: float | None = None
    refused: bool = False


Steps = AsyncGenerator[Step, Taken | None]


async def run_steps(
    backend: Backend,
    steps: Steps,
    *,
    on_step: Callable[[Taken], Awaitable[None]] | None = None,
    report: JobReport | None = None,
    advice: str = "Lower learning_rate, and look for extreme logprobs or advantages",
) -> list[StepMetrics]:
    """Take every step that ``steps`` yields.

    A cancellation lets the current step and its ``on_step`` finish, so that no half-accumulated gradient is left in
    the backend.

    Args:
        on_step: called after each step.
        report: is told what is being done.
        advice: what the user may try when the loss is not finite; ends the error's text.

    Returns:
        metrics of each step.

    Raises:
        JobError: the loss is missing or not finite; that step was not taken, the ones before were.
        DataError, ConfigError: the backend refuses the Datums or the loss.
        NonFiniteGradientError: the gradient is not finite; the weights are those of the step before.
    """
    watch = _Watch(report)

    async def take(step: Step) -> Taken:
        taken = await _take(backend, step, watch, advice)
        if taken.refused:
            return taken
        watch.taken(taken)
        if on_step is not None:
            await on_step(taken)
        return taken

    async with aclosing(steps):
        step = await anext(steps, None)
        while step is not None:
            taken = await uninterrupted(take(step))
            try:
                step = await steps.asend(taken)
            except StopAsyncIteration:
                step = None
    watch.summarize()  # the algorithm may have added to the metrics of its last step
    return watch.history


class _Watch:
    """Keeps the history, and a job's report where there is one."""

    def __init__(self, report: JobReport | None) -> None:
        self.report = JobReport() if report is None else report
        self.history: list[StepMetrics] = []
        self._told = report is not None
        self._done = 0.0

    def begin(self, step: Step) -> None:
        self.report.step, self.report.steps = step.number, step.total
        self.report.enter("forward_backward")

    def advance(self, step: Step, fraction: float) -> None:
        self.report.advance(STEPS_SHARE * (self._done + fraction * step.share))

    def taken(self, taken: Taken) -> None:
        self.advance(taken.step, 1.0)
        self._done += taken.step.share
        self.history.append(taken.metrics)
        self.summarize()

    def summarize(self) -> None:
        """Report the results of the steps so far to the job."""
        if self._told and self.history:
            self.report.metrics = summarize(self.history)
            self.report.metrics_by_step[len(self.history) - 1 :] = [summarize(self.history[-1:])]
            self.report.tokens_per_second = self.report.metrics["tokens_per_second"]


async def _take(backend: Backend, step: Step, watch: _Watch, advice: str) -> Taken:
    started = time.monotonic()
    report = watch.report
    watch.begin(step)
    output = await _watched(_forward_backward(backend, step), backend, step, watch)
    report.loss = output.metrics.get("loss:sum")
    if report.loss is None or not math.isfinite(report.loss):
        await backend.discard_gradient_async()  # or the next step would start with it
        raise JobError(_bad_loss(step, report.loss, advice))
    moved = None if step.moved is None else step.moved(output)
    refused = step.most_kl is not None and moved is not None and moved > step.most_kl
    response = types.OptimStepResponse(metrics={})
    if refused:
        await backend.discard_gradient_async()
    else:
        report.enter("optim_step")
        response = await backend.optim_step_async(step.adam)
    metrics = StepMetrics(
        tokens=step.tokens,
        sampled_tokens=step.sampled_tokens,
        seconds=time.monotonic() - started,
        values={
            **output.metrics,
            **(response.metrics or {}),
            **step.measured,
            "learning_rate": step.adam.learning_rate,
        },
        mean_over=step.mean_over,
        normalized=step.normalized,
    )
    return Taken(step, output, metrics, moved, refused)


def _forward_backward(backend: Backend, step: Step) -> Awaitable[types.ForwardBackwardOutput]:
    if isinstance(step.loss, NamedLoss):
        return backend.forward_backward_async(step.data, loss_fn=step.loss.name, loss_fn_config=step.loss.config)
    return backend.forward_backward_custom_async(step.data, step.loss)


async def _watched(
    pending: Awaitable[types.ForwardBackwardOutput], backend: Backend, step: Step, watch: _Watch
) -> types.ForwardBackwardOutput:
    """Await a forward_backward, polling the backend for its progress."""
    future = asyncio.ensure_future(pending)
    seen = backend.progress
    while not future.done():
        await asyncio.wait({future}, timeout=POLL_SECONDS)
        now = backend.progress
        if now is not None and now != seen:
            done, total = seen = now
            watch.advance(step, min(done / total, 1.0) if total else 0.0)
    return future.result()


def _bad_loss(step: Step, loss: float | None, advice: str) -> str:
    seen = "the backend returned no `loss:sum`" if loss is None else f"the loss (`loss:sum`) is {loss}"
    return f"step {step.number}/{step.total}: {seen}; the weights are those after the previous step. {advice}"
