"""One copy of the base model, in a process of its own that Ray keeps alive (or several: see ``split``).

A replica keeps nothing that could be lost: every call brings the weights that it is about, and every result goes back
to the caller, who adds gradients up and takes the steps. So Ray may run a call of a killed replica again as it is.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from nat_plugin_evsys.engine.gradient.datums import Example
from nat_plugin_evsys.engine.gradient.results import DatumResult
from nat_plugin_evsys.engine.gradient.steps import Pass
from nat_plugin_evsys.engine.machine.memory import peak_bytes
from nat_plugin_evsys.engine.sampling.client import LocalSamplingClient
from nat_plugin_evsys.engine.sampling.result import SampleResult
from nat_plugin_evsys.errors import OperationCancelled, UnsupportedError
from nat_plugin_evsys.inbox import LoopInbox
from nat_plugin_evsys.replicas.orders import Item, SampleOrder, Tokens
from nat_plugin_evsys.replicas.passes import Order, Passes, ReplicaSettings, open_part
from nat_plugin_evsys.replicas.split import Followers, whole_group
from nat_plugin_evsys.replicas.weights import Flat, Weights, empty_adapter, fill, flatten

_KEPT_VERSIONS = 4
"""Policy versions that stay ready to be sampled from; older ones are fetched again."""


@dataclass(frozen=True)
class ShareResult:
    """A replica's part of a pass.

    Attributes:
        gradient: in the form of ``weights.flatten``; None without a backward pass.
        seconds: that it took.
        pid: of the process that computed it.
    """

    datums: list[DatumResult]
    gradient: Flat | None
    metrics: dict[str, float]
    seconds: float
    pid: int


class Replica:
    """The actor. Its methods run in one event loop; passes run in one thread, and samples in the sampler's."""

    def __init__(self, settings: ReplicaSettings) -> None:
        self._followers = Followers(settings) if settings.parts > 1 else None
        self._shared = open_part(settings)
        self._passes = Passes(self._shared)
        self._sampled: OrderedDict[tuple[str, int], LocalSamplingClient] = OrderedDict()
        self._opening = threading.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="evsys-pass")

    async def facts(self) -> dict[str, Any]:
        """``pid``, ``host``, ``node`` (Ray's id), ``device``, ``dtype``, ``memory`` (peak bytes), ``identity`` (of the
        base)."""
        import ray

        base = self._shared.base
        return {
            "pid": os.getpid(),
            "node": ray.get_runtime_context().get_node_id(),
            "host": socket.gethostname(),
            "device": str(base.device) if base.device.type == "cpu" else torch.cuda.get_device_name(base.device),
            "dtype": str(base.dtype).removeprefix("torch."),
            "memory": peak_bytes(base.device),
            "identity": base.identity,
        }

    async def is_healthy(self) -> bool:
        """See ``SharedBase.is_healthy``."""
        if self._followers is not None:
            return True  # a pass needs all of them; one that ends takes the others with it
        return await asyncio.to_thread(self._shared.is_healthy)

    async def compute(self, weights: Weights, examples: Sequence[Example], of: Pass) -> ShareResult:
        """A share of a pass. Cancelling it stops the work at the next micro-batch.

        Raises:
            ReplicaError: the weights here are not those that were sent.
        """
        stop = threading.Event()
        work = asyncio.get_running_loop().run_in_executor(self._thread, self._compute, weights, examples, of, stop)
        try:
            return await work
        finally:
            stop.set()

    def _compute(self, weights: Weights, examples: Sequence[Example], of: Pass, stop: threading.Event) -> ShareResult:
        started = time.perf_counter()

        def progress(done: int, total: int) -> None:
            # Not between followers: all of them go through all micro-batches.
            if stop.is_set() and self._followers is None:
                raise OperationCancelled

        known = self._passes.knows(weights.shape, weights.key)
        order = Order(weights.shape, weights.key, None if known else _fetched(weights), examples, of)
        if self._followers is None:
            adapter, found = self._passes.run(order, weights.digest, progress)
        else:
            self._followers.send(order)
            with whole_group():
                adapter, found = self._passes.run(order, weights.digest, progress)
        gradient = flatten(dataclasses.replace(adapter, weights=_pairs(found.gradient))) if of.backward else None
        return ShareResult(found.datums, gradient, found.metrics, time.perf_counter() - started, os.getpid())

    async def sample(self, weights: Weights | None, version: int, order: SampleOrder) -> AsyncIterator[Item]:
        """The tokens as they come, if the order asks for that, and then the result.

        Args:
            weights: None is the bare base model.
        """
        client = await asyncio.to_thread(self._client, weights, version)
        loop = asyncio.get_running_loop()
        inbox = LoopInbox.of(loop)
        items: asyncio.Queue[Tokens | None] = asyncio.Queue()

        def put(item: Tokens | None) -> None:
            inbox.call(loop, items.put_nowait, item)

        future: Future[Any] = await asyncio.to_thread(order.submit, client, put)
        future.add_done_callback(lambda _: put(None))
        try:
            while (item := await items.get()) is not None:
                yield item
            result = future.result()
            # Not with the tokenizer: the receiver has its own.
            yield result.decoded_by(None) if isinstance(result, SampleResult) else result
        finally:
            future.cancel()

    def _client(self, weights: Weights | None, version: int) -> LocalSamplingClient:
        if self._followers is not None:
            raise UnsupportedError("a replica whose model is split computes passes only; set rollout_engine: vllm")
        if weights is None:
            return self._shared.sampler.client(None, version)
        with self._opening:
            key = (weights.key, version)
            client = self._sampled.pop(key, None)
            if client is None:
                adapter = empty_adapter(weights.shape, self._shared.base.model)
                fill(adapter, _fetched(weights))
                client = self._shared.sampler.client(adapter, version)
            self._sampled[key] = client
            while len(self._sampled) > _KEPT_VERSIONS:
                self._sampled.popitem(last=False)
            return client


def _fetched(weights: Weights) -> Flat:
    import ray

    values: Flat = ray.get(weights.values)
    return values


def _pairs(gradient: dict[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A gradient by tensor name in the form of an adapter's weights."""
    suffix = ".lora_A.weight"
    names = [name.removesuffix(suffix) for name in gradient if name.endswith(suffix)]
    return {name: (gradient[f"{name}.lora_A.weight"], gradient[f"{name}.lora_B.weight"]) for name in names}
