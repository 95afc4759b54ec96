"""More and fewer replicas in the middle of a training, on a real Ray cluster (`make test-ray`)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import pytest_asyncio
import torch
from random_datums import related_datums
from tinker import types
from torch import Tensor

from nat_plugin_evsys.backends.ray import RayBackend
from nat_plugin_evsys.config.ray import RayConfig
from nat_plugin_evsys.errors import ConfigError, EngineClosedError, ReplicaError
from nat_plugin_evsys.replicas.base import ReplicatedBase
from nat_plugin_evsys.replicas.cluster import Replicas
from nat_plugin_evsys.replicas.passes import ReplicaSettings
from nat_plugin_evsys.replicas.pool import ReplicaPool

ray = pytest.importorskip("ray", reason="needs Ray: make test-ray")

pytestmark = pytest.mark.asyncio(loop_scope="module")

ADAM = types.AdamParams(learning_rate=1e-2)
PROMPTS = [types.ModelInput.from_ints(list(range(first, first + 50))) for first in range(0, 80, 10)]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(num_cpus=3, object_store_memory=80 << 20, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def backend(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RayBackend]:
    directory = tmp_path_factory.mktemp("scaled")
    made = await RayBackend.start("builtin/tiny", RayConfig(replicas=1), rank=4, checkpoint_dir=directory)
    await made.save_full_state("fresh")
    yield made
    await made.close()


def pool_of(backend: RayBackend) -> ReplicaPool:
    shared = backend._shared
    assert isinstance(shared, ReplicatedBase)
    return shared.pool


async def scale(backend: RayBackend, count: int) -> None:
    await asyncio.to_thread(pool_of(backend).scale, count)


async def states(backend: RayBackend) -> list[str]:
    return [each["state"] for each in await asyncio.to_thread(backend.replicas)]


async def until(condition: Any) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - of other threads
            await asyncio.sleep(0.01)


async def train(backend: RayBackend, counts: dict[int, int]) -> tuple[list[Any], dict[str, Tensor]]:
    """Eight steps from the fresh adapter; ``counts``: how many replicas there are to be, from the middle of a step on.

    Returns:
        The outputs and the weights.
    """
    await backend.load_state(str(backend.checkpoint_dir / "fresh"), with_optimizer=True)
    outputs = []
    for step in range(8):
        work = asyncio.ensure_future(_awaited(backend, step))
        await until(lambda work=work: work.done() or any(member.passing for member in pool_of(backend).members))
        change = asyncio.create_task(scale(backend, counts.get(step, len(pool_of(backend).members))))
        outputs.append(await work)
        await backend.optim_step_async(ADAM)
        await change
    assert backend.step == 8
    return outputs, {name: tensor.detach().clone() for name, tensor in backend._model.adapter.named_tensors()}


async def _awaited(backend: RayBackend, step: int) -> types.ForwardBackwardOutput:
    return await backend.forward_backward_async(related_datums(step, "ppo", count=60, longest=60), loss_fn="ppo")


async def test_scaling_in_the_middle_of_a_training_changes_nothing(backend: RayBackend) -> None:
    expected, unscaled = await train(backend, {})
    found, scaled = await train(backend, {1: 2, 5: 1})
    # The pass in which the number changes ends with the replicas that it began with.
    assert [output.metrics["replicas:max"] for output in found] == [1, 1, 2, 2, 2, 2, 1, 1]
    assert await states(backend) == ["up"]
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.metrics["datum_tokens:sum"] == theirs.metrics["datum_tokens:sum"]
        for a, b in zip(mine.loss_fn_outputs, theirs.loss_fn_outputs, strict=True):
            assert torch.allclose(a["logprobs"].to_torch(), b["logprobs"].to_torch(), atol=1e-4)
    difference = torch.stack([(scaled[name] - tensor).norm() for name, tensor in unscaled.items()]).norm()
    assert float(difference / torch.stack([tensor.norm() for tensor in unscaled.values()]).norm()) < 1e-5


async def test_what_is_being_sampled_on_a_removed_replica_ends_first(backend: RayBackend) -> None:
    client = await backend.snapshot_sampling_client()

    async def sampled() -> list[list[int]]:
        params = types.SamplingParams(max_tokens=150, seed=1, stop=[])
        replies = await asyncio.gather(*(client.sample_async(prompt, 2, params) for prompt in PROMPTS))
        return [sequence.tokens for reply in replies for sequence in reply.sequences]

    expected = await sampled()
    await scale(backend, 2)
    assert await states(backend) == ["up", "up"]
    work = asyncio.ensure_future(sampled())
    leaving = pool_of(backend).members[1]
    await until(lambda: leaving.in_flight)
    change = asyncio.create_task(scale(backend, 1))
    await until(lambda: leaving.leaving)
    assert not change.done()
    assert await states(backend) in (["up", "leaving"], ["up"])  # the second, if it has ended already
    assert await work == expected
    await change
    assert not leaving.busy
    assert await states(backend) == ["up"]
    assert await sampled() == expected


async def test_what_does_not_fit_is_refused_and_changes_nothing(backend: RayBackend) -> None:
    with pytest.raises(ConfigError, match="8 more replicas with 1 CPU each needs 8 CPU, and the cluster has 2 free"):
        await scale(backend, 9)
    assert await states(backend) == ["up"]
    assert await backend.is_healthy()


async def test_a_pool_that_is_closed_while_it_grows_ends_all(backend: RayBackend) -> None:
    free = ray.available_resources()["CPU"]
    settings = ReplicaSettings("builtin/tiny", {"device": "cpu"}, 8, False, 1)
    pool = await asyncio.to_thread(ReplicaPool, settings, Replicas(1))
    change = asyncio.create_task(asyncio.to_thread(pool.scale, 2))
    await until(lambda: len(pool._alive) == 2)
    await asyncio.to_thread(pool.close)
    with pytest.raises(ReplicaError):
        await change
    await until(lambda: ray.available_resources().get("CPU", 0.0) == free)
    with pytest.raises(EngineClosedError):
        await asyncio.to_thread(pool.scale, 2)
