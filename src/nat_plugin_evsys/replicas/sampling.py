"""Sampling by replicas, with the clients and requests of the embedded sampler."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from functools import partial
from itertools import count
from typing import Any

from tinker import types

from nat_plugin_evsys.engine.model.images import NoImages
from nat_plugin_evsys.engine.model.loading import BaseModel
from nat_plugin_evsys.engine.model.lora import LoraAdapter
from nat_plugin_evsys.engine.sampling.client import LocalSamplingClient, Prompt
from nat_plugin_evsys.engine.sampling.grammars import Grammars
from nat_plugin_evsys.engine.sampling.policies import SamplingPolicy
from nat_plugin_evsys.engine.sampling.request import Limits, SampleRequest
from nat_plugin_evsys.engine.sampling.result import SampleResult
from nat_plugin_evsys.engine.sampling.stopping import eos_token_ids
from nat_plugin_evsys.errors import EngineClosedError, EvsysError
from nat_plugin_evsys.loop_thread import LoopThread
from nat_plugin_evsys.replicas.answers import readable
from nat_plugin_evsys.replicas.members import Member
from nat_plugin_evsys.replicas.orders import Delivery, SampleOrder, Tokens, with_seed
from nat_plugin_evsys.replicas.pool import ReplicaPool
from nat_plugin_evsys.replicas.routing import PrefixRoutes
from nat_plugin_evsys.replicas.weights import Weights, flatten, publish

_BARE = "bare"


class ReplicaSampler:
    """Stands where ``Sampler`` does: hands out clients, and has the replicas answer their requests."""

    def __init__(self, base: BaseModel, pool: ReplicaPool) -> None:
        self.tokenizer = copy.deepcopy(base.tokenizer)
        eos = eos_token_ids(base.model, base.tokenizer, base.vocab_size)
        self.limits = Limits(base.context_length, base.vocab_size, eos, NoImages("replicas read text only"))
        self.grammars = None if base.tokenizer is None else Grammars(self.tokenizer, base.vocab_size, eos)
        self._pool = pool
        self._routes = PrefixRoutes()
        self._seen: list[tuple[Member, int]] = []
        self._idents = count()
        self._loop = LoopThread("evsys-replicas")

    def client(self, adapter: LoraAdapter | None, policy_version: int) -> ReplicaSamplingClient:
        """A client of one policy version, with the adapter's values as they are now. None is the bare base model."""
        weights = None
        if adapter is not None:
            adapter = adapter.snapshot()
            weights = publish(adapter, flatten(adapter), check=False)
        return ReplicaSamplingClient(self, SamplingPolicy(next(self._idents), policy_version, adapter), weights)

    def rest(self, client: LocalSamplingClient) -> None:
        """Does nothing: each replica bounds by itself how many versions it keeps."""

    def send(self, request: SampleRequest, order: SampleOrder, weights: Weights | None, version: int) -> None:
        """Have a replica answer a request; its future ends with the result, an error, or by being cancelled."""
        try:
            task = self._loop.run(self._follow(request, order, weights, version))
        except EngineClosedError:
            request.fail(_closed_error())
            return
        request.future.add_done_callback(lambda future: task.cancel() if future.cancelled() else None)

    async def _follow(self, request: SampleRequest, order: SampleOrder, weights: Weights | None, version: int) -> None:
        """One request from its start to its end, in the event loop."""
        policy = _BARE if weights is None else weights.key
        try:
            with self._pool.sampling(max(1, order.num_samples), partial(self._choose, policy, order.prompt)) as member:
                result = await self._received(member.actor, request, order, weights, version)
                if isinstance(result, SampleResult):
                    member.tokens += sum(len(sequence.tokens) for sequence in result.sequences)
            request.answer(result)
        except asyncio.CancelledError:
            if self._loop.closed:
                request.fail(_closed_error())
            request.acknowledge_cancel()
            raise
        except Exception as exc:  # noqa: BLE001 - boundary: whatever went wrong belongs to the request
            request.fail(exc if isinstance(exc, EvsysError) else readable(exc))

    async def _received(
        self, actor: Any, request: SampleRequest, order: SampleOrder, weights: Weights | None, version: int
    ) -> SampleResult | list[float | None]:
        import ray

        stream = actor.sample.options(num_returns="streaming").remote(weights, version, order)
        delivery = None if request.on_tokens is None else Delivery(request, request.on_tokens)
        try:
            async for reference in stream:
                item = await reference
                if not isinstance(item, Tokens):
                    return self._complete(item, request, delivery)
                if delivery is not None:
                    delivery.take(item)
        except asyncio.CancelledError:
            ray.cancel(stream)
            raise
        raise CancelledError

    def _complete(
        self, item: SampleResult | list[float | None], request: SampleRequest, delivery: Delivery | None
    ) -> SampleResult | list[float | None]:
        if isinstance(item, list):
            return item
        if delivery is not None:
            delivery.finish(item)
        return item.decoded_by(request.decode)

    def _choose(self, policy: str, prompt: list[int], members: Sequence[Member]) -> int:
        now = [(member, member.restarts) for member in members]
        for number in range(max(len(now), len(self._seen))):
            if now[number : number + 1] != self._seen[number : number + 1]:
                self._routes.forget(number)  # another one, started again, or gone
        self._seen = now
        return self._routes.choose(policy, prompt, [member.in_flight for member in members])

    def close(self) -> None:
        """Fail requests in flight with ``EngineClosedError`` and end the thread. Idempotent."""
        self._loop.close()


class ReplicaSamplingClient(LocalSamplingClient):
    """Samples from one fixed policy version, on whichever replica suits."""

    def __init__(self, sampler: ReplicaSampler, policy: SamplingPolicy, weights: Weights | None) -> None:
        super().__init__(sampler, policy)  # type: ignore[arg-type]  # requests are submitted below, not by the policy
        self._sampler = sampler
        self._weights = weights

    def submit(self, prompt: Prompt, num_samples: int, params: types.SamplingParams, **options: Any) -> Future[Any]:
        """See ``LocalSamplingClient``. The request is checked here, before it is sent."""
        params = with_seed(params)
        future: Future[Any] = Future()
        try:
            request = SampleRequest(
                prompt, num_samples, params, self._sampler.limits, self._sampler.tokenizer, **options
            )
        except EvsysError as exc:
            future.set_exception(exc)
            return future
        order = SampleOrder.of(request.prompt, num_samples, params, options)
        self._sampler.send(request, order, self._weights, self.policy_version)
        return request.future


def _closed_error() -> EngineClosedError:
    return EngineClosedError("the sampler has been closed and takes no more requests; create a new one")
