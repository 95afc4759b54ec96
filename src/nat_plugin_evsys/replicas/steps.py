"""Passes over Datums, shared out among replicas; the weights and the optimizer stay in this process."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from nat_plugin_evsys.engine.gradient.datums import Example
from nat_plugin_evsys.engine.gradient.results import DatumResult
from nat_plugin_evsys.engine.gradient.steps import Pass, PassResult, Progress
from nat_plugin_evsys.engine.model.lora import LoraAdapter
from nat_plugin_evsys.errors import DataError
from nat_plugin_evsys.replicas.members import Member
from nat_plugin_evsys.replicas.pool import ReplicaPool
from nat_plugin_evsys.replicas.replica import ShareResult
from nat_plugin_evsys.replicas.shares import Shares, share_out
from nat_plugin_evsys.replicas.weights import Flat, Weights, flatten, publish, split

CHECK_EVERY = 10
"""The weights of each replica are compared with those here, by hash, at every so many changes of them."""


class ReplicaSteps:
    """``Steps`` over a pool. The same Datums give the same plan and, summed in the order of the replicas, the same
    gradient, bit for bit, at the same number of replicas."""

    def __init__(self, pool: ReplicaPool, adapter: LoraAdapter) -> None:
        self._pool = pool
        self._adapter = adapter
        self._changes = 0
        self._values: Flat | None = None
        self._weights: Weights | None = None

    def run(self, examples: Sequence[Example], of: Pass, progress: Progress | None) -> PassResult:
        """See ``Steps``; ``progress`` is called several times a second, and counts the shares that are done."""
        if any(example.images for example in examples):
            raise DataError("a Datum has an image, and replicas read text only; train on images without ray")
        with self._pool.passing() as members:
            return self._run(members, examples, of, progress)

    def _run(
        self, replicas: Sequence[Member], examples: Sequence[Example], of: Pass, progress: Progress | None
    ) -> PassResult:
        shares = share_out([e.tokens.numpy() for e in examples], len(replicas))
        sizes = [sum(len(examples[i]) for i in members) for members in shares.members]

        def poll(done: list[int]) -> None:
            if progress is not None:
                progress(sum(sizes[number] for number in done), sum(sizes))

        parts = [[examples[i] for i in members] for members in shares.members]
        found = self._pool.compute(replicas, self._published(), parts, of, poll)
        datums: dict[int, DatumResult] = {}
        for members, share in zip(shares.members, found, strict=True):
            if share is not None:
                datums.update(zip(members, share.datums, strict=True))
        gradient = split(self._adapter, self._sum(found)) if of.backward else {}
        return PassResult([datums[i] for i in range(len(examples))], gradient, self._metrics(shares, found))

    def _published(self) -> Weights:
        """The adapter as it is now, stored again only if it has changed."""
        values = flatten(self._adapter)
        if self._weights is None or self._values is None or not np.array_equal(values, self._values):
            check = self._changes % CHECK_EVERY == 0
            self._values, self._weights = values, publish(self._adapter, values, check=check)
            self._changes += 1
        return self._weights

    def _sum(self, found: Sequence[ShareResult | None]) -> torch.Tensor:
        first, *rest = (share.gradient for share in found if share is not None and share.gradient is not None)
        total = first.copy()  # the object store's memory is read-only
        for gradient in rest:
            total += gradient
        return torch.from_numpy(total).to(next(self._adapter.named_tensors())[1].device)

    def _metrics(self, shares: Shares, found: Sequence[ShareResult | None]) -> dict[str, float]:
        """The replicas' own, each reduced as its name says, and the plan's."""
        given = [share.metrics for share in found if share is not None]
        names = dict.fromkeys(name for metrics in given for name in metrics)
        values = {name: [metrics[name] for metrics in given if name in metrics] for name in names}
        metrics = {name: max(of) if name.endswith(":max") else sum(of) for name, of in values.items()}
        return {**metrics, **shares.metrics(), "replica_restarts:max": float(self._pool.restarts())}
