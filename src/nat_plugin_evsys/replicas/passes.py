"""The passes of a replica: over its copy of the base model, or its part of one, and the adapters that were sent."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from nat_plugin_evsys.engine.gradient.batching import default_token_budget
from nat_plugin_evsys.engine.gradient.datums import Example
from nat_plugin_evsys.engine.gradient.steps import LocalSteps, Pass, PassResult, Progress
from nat_plugin_evsys.engine.model.lora import LoraAdapter
from nat_plugin_evsys.engine.model.tensor_parallel import is_split
from nat_plugin_evsys.errors import ReplicaError
from nat_plugin_evsys.replicas.weights import Flat, Shape, digest, empty_adapter, fill, flatten
from nat_plugin_evsys.runtime.bases import SharedBase, open_here


@dataclass(frozen=True)
class ReplicaSettings:
    """What a replica is started with, now and after its death.

    Attributes:
        options: of ``load_base_model``.
        threads: it computes on.
        parts: processes that the model is split over, each with a GPU where there are any.
    """

    base_model: str
    options: dict[str, Any]
    max_batch_size: int
    deterministic: bool
    threads: int
    parts: int = 1


@dataclass(frozen=True)
class Order:
    """What all processes of a replica compute.

    Attributes:
        values: of the adapter; None if they are those of the order before.
    """

    shape: Shape
    key: str
    values: Flat | None
    examples: Sequence[Example]
    of: Pass


def open_part(settings: ReplicaSettings) -> SharedBase:
    """The base model, or this process's part of it."""
    torch.set_num_threads(settings.threads)
    return open_here(
        settings.base_model,
        max_batch_size=settings.max_batch_size,
        deterministic=settings.deterministic,
        parts=settings.parts,
        **settings.options,
    )


@dataclass
class _Trained:
    """What passes over adapters of one shape need, and the weights that are in it."""

    adapter: LoraAdapter
    steps: LocalSteps
    key: str = ""


class Passes:
    """Computes passes, and keeps the adapters that they are over."""

    def __init__(self, shared: SharedBase) -> None:
        self._shared = shared
        self._trained: dict[Shape, _Trained] = {}

    def run(
        self, order: Order, digest_of: str | None = None, progress: Progress | None = None
    ) -> tuple[LoraAdapter, PassResult]:
        """The pass of an order, and the adapter that it is over.

        Args:
            digest_of: what the digest of the values must be.

        Raises:
            ReplicaError: it is another one.
        """
        trained = self._trained.get(order.shape)
        if trained is None:
            adapter = empty_adapter(order.shape, self._shared.base.model)
            trained = self._trained[order.shape] = _Trained(adapter, LocalSteps(self._shared.base, adapter))
        if order.values is not None:
            trained.key = ""
            fill(trained.adapter, order.values)
            if digest_of is not None and digest(flatten(trained.adapter)) != digest_of:
                raise ReplicaError(
                    f"the replica of process {os.getpid()} on {socket.gethostname()} has other weights than were sent "
                    "to it: its memory or its network is at fault; take the machine out of the cluster"
                )
            trained.key = order.key
        return trained.adapter, trained.steps.run(order.examples, self._cut_alike(order.of), progress)

    def _cut_alike(self, of: Pass) -> Pass:
        """The pass in micro-batches that fit in every process of a split model: each has other memory free, and
        collectives of different micro-batches would not match."""
        base = self._shared.base
        if of.token_budget is not None or not is_split(base.model):
            return of
        least = torch.tensor(default_token_budget(base), device=base.device)
        dist.all_reduce(least, op=dist.ReduceOp.MIN)
        return replace(of, token_budget=int(least))

    def knows(self, shape: Shape, key: str) -> bool:
        """Whether the adapter of that shape has these values."""
        return shape in self._trained and self._trained[shape].key == key
