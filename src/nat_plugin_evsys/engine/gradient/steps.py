"""One pass over checked Datums, wherever it is computed: what goes in, what comes out, and the way of this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from nat_plugin_evsys.engine.gradient.datums import Example
from nat_plugin_evsys.engine.gradient.micro_batches import Loss, MicroBatches
from nat_plugin_evsys.engine.gradient.results import DatumResult
from nat_plugin_evsys.engine.machine.allocator import keep_memory, note_step
from nat_plugin_evsys.engine.model.loading import BaseModel
from nat_plugin_evsys.engine.model.lora import LoraAdapter
from nat_plugin_evsys.engine.model.tensor_parallel import is_split

Progress = Callable[[int, int], None]
"""``(done tokens, total tokens)``, called as the work goes on. Raising from it abandons the operation."""


@dataclass(frozen=True)
class Pass:
    """What is to be computed.

    Attributes:
        backward: the gradient is wanted, too.
        bare: without the adapter.
        token_budget: see ``TrainableModel``.
    """

    loss: Loss
    backward: bool
    bare: bool = False
    token_budget: int | None = None


@dataclass(frozen=True)
class PassResult:
    """What was computed.

    Attributes:
        datums: in the order of the Datums.
        gradient: of the sum over Datums, by tensor name, fp32; empty without ``Pass.backward``.
        metrics: what the work was, see ``TrainableModel.forward_backward``.
    """

    datums: list[DatumResult]
    gradient: dict[str, Tensor]
    metrics: dict[str, float]


class Steps(Protocol):
    """Computes passes of one adapter with the values that its tensors have at the call."""

    def run(self, examples: Sequence[Example], of: Pass, progress: Progress | None) -> PassResult:
        """All or nothing."""
        ...


class LocalSteps:
    """In this process, in micro-batches that fit in memory.

    Args:
        path: see ``TrainableModel``; always ``plain`` for a model that is split over processes.
    """

    def __init__(self, base: BaseModel, adapter: LoraAdapter, path: Literal["auto", "plain"] = "auto") -> None:
        if base.device.type == "cpu":
            keep_memory()
        self._parameters = dict(adapter.named_tensors())
        self._batches = MicroBatches(base, adapter, "plain" if is_split(base.model) else path)

    def run(self, examples: Sequence[Example], of: Pass, progress: Progress | None) -> PassResult:
        """See ``Steps``; ``progress`` is called after each micro-batch."""
        total, done = sum(len(e) for e in examples), 0
        gradient = {name: torch.zeros_like(p) for name, p in self._parameters.items()} if of.backward else {}
        results: dict[int, DatumResult] = {}
        work = self._batches.plan(examples, of.loss, of.token_budget)
        for batch in work:
            found = self._batches.run(batch, examples, of.loss, gradient, bare=of.bare)
            results.update(zip(batch.members, found, strict=True))
            done += sum(len(examples[i]) for i in batch.members)
            if progress is not None:
                progress(done, total)
        note_step()
        return PassResult([results[i] for i in range(len(examples))], gradient, self._batches.metrics(work, examples))
