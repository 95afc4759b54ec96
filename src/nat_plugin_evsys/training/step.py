"""One optimizer step of a job: forward and backward, a look at the loss, AdamW, and what the report says of it."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from tinker import types

from nat_plugin_evsys.backends.base import Backend
from nat_plugin_evsys.errors import JobError
from nat_plugin_evsys.training.job_report import JobReport
from nat_plugin_evsys.training.step_metrics import StepMetrics, summarize

T = TypeVar("T")
Advance = Callable[[float], None]

POLL_SECONDS = 0.2
"""How often a backend is asked how far its forward_backward is."""

STEPS_SHARE = 98.0
"""Progress when all optimizer steps are done; publishing is the rest."""


async def take_step(
    backend: Backend,
    report: JobReport,
    history: list[StepMetrics],
    forward_backward: Callable[[Advance], Awaitable[types.ForwardBackwardOutput]],
    adam: types.AdamParams,
    *,
    tokens: int,
    sampled_tokens: int,
    total_tokens: int,
    advice: str,
    mean_over: int | None = None,
) -> None:
    """Run ``forward_backward`` and one optimizer step; the step's metrics join ``history`` and the report.

    Args:
        forward_backward: is given what to call with the fraction of the step that is done.
        tokens: Datum tokens of this step; ``total_tokens``: of all steps of the job.
        sampled_tokens: those of them that are trained on.
        advice: what the user may try when the loss is not finite.
        mean_over: what the backend's means are over; see StepMetrics.

    Raises:
        JobError: the loss is missing or not finite; no step was taken.
    """
    before = sum(metrics.tokens for metrics in history)
    started = time.monotonic()

    def advance(fraction: float) -> None:
        report.advance(STEPS_SHARE * (before + fraction * tokens) / total_tokens)

    report.enter("forward_backward")
    output = await forward_backward(advance)
    report.loss = output.metrics.get("loss:sum")
    await check_loss(backend, report, advice)
    report.enter("optim_step")
    response = await backend.optim_step_async(adam)
    advance(1.0)
    history.append(
        StepMetrics(
            tokens=tokens,
            sampled_tokens=sampled_tokens,
            seconds=time.monotonic() - started,
            values={**output.metrics, **(response.metrics or {})},
            mean_over=mean_over,
        )
    )
    report.metrics = summarize(history)
    report.tokens_per_second = report.metrics["tokens_per_second"]


async def watched(pending: Awaitable[T], backend: Backend, advance: Callable[[float], None]) -> T:
    """Await an operation, asking the backend now and then how far it is."""
    future = asyncio.ensure_future(pending)
    seen = backend.progress
    while not future.done():
        await asyncio.wait({future}, timeout=POLL_SECONDS)
        now = backend.progress
        if now is not None and now != seen:
            done, total = seen = now
            advance(min(done / total, 1.0) if total else 0.0)
    return future.result()


async def check_loss(backend: Backend, report: JobReport, advice: str) -> None:
    """Refuse to step on a loss that is no finite number, and leave no gradient of it behind.

    Args:
        advice: what the user may try; ends the error's text.

    Raises:
        JobError: ``report.loss`` is None or not finite.
    """
    if report.loss is not None and math.isfinite(report.loss):
        return
    await backend.discard_gradient_async()  # or the next job would start with it
    seen = "the backend returned no `loss:sum`" if report.loss is None else f"the loss (`loss:sum`) is {report.loss}"
    raise JobError(f"step {report.step}/{report.steps}: {seen}; the weights are as the step before left them. {advice}")
