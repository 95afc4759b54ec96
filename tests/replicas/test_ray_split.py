"""A replica whose model is split over two processes. Ray counts made-up GPUs, and they compute on the CPU."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psutil
import pytest
import pytest_asyncio
import torch
from random_datums import related_datums
from tinker import types

from nat_plugin_evsys.backends.local import LocalBackend
from nat_plugin_evsys.backends.ray import RayBackend
from nat_plugin_evsys.config.ray import RayConfig
from nat_plugin_evsys.errors import UnsupportedError

ray = pytest.importorskip("ray", reason="make test-ray")
if ray.__spec__.origin is None:
    pytest.skip("a folder named ray is no package", allow_module_level=True)

BASE = "builtin/tiny"

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def split(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RayBackend]:
    directory = tmp_path_factory.mktemp("split")
    settings = RayConfig(replicas=1, gpus_per_replica=2)
    backend = await RayBackend.start(BASE, settings, rank=4, device="cpu", checkpoint_dir=directory)
    yield backend
    await backend.close()


async def test_a_split_replica_trains_as_one_process_does_and_outlives_a_killed_part(
    split: RayBackend, tmp_path: Path
) -> None:
    local = await LocalBackend.create(BASE, rank=4, device="cpu", checkpoint_dir=tmp_path)
    for step in range(3):  # from the second one on with B that is not zero
        data = related_datums(step, "ppo", count=9)
        expected = await local.forward_backward_async(data, loss_fn="ppo")
        work = split.forward_backward_async(data, loss_fn="ppo")
        if step == 2:
            leader = psutil.Process((await asyncio.to_thread(split.replicas))[0]["pid"])
            followers = [child for child in leader.children() if "spawn_main" in " ".join(child.cmdline())]
            assert len(followers) == 1
            os.kill(followers[0].pid, signal.SIGKILL)
        found = await work
        for mine, theirs in zip(found.loss_fn_outputs, expected.loss_fn_outputs, strict=True):
            assert torch.allclose(mine["logprobs"].to_torch(), theirs["logprobs"].to_torch(), atol=1e-4)
        mine, theirs = dict(split._model.gradient or {}), dict(local._model.gradient or {})
        gap = torch.stack([(mine[name] - theirs[name]).norm() for name in theirs]).norm()
        assert float(gap / torch.stack([value.norm() for value in theirs.values()]).norm()) < 1e-5
        for backend in (local, split):
            await backend.optim_step_async(types.AdamParams(learning_rate=1e-2))
    base = [await backend.base_logprobs_async(data) for backend in (local, split)]
    for theirs, mine in zip(*base, strict=True):
        assert torch.allclose(mine.to_torch(), theirs.to_torch(), atol=1e-4)
    assert (await asyncio.to_thread(split.replicas))[0]["restarts"] == 1
    await local.close()


async def test_a_split_replica_says_that_it_does_not_sample(split: RayBackend) -> None:
    client = await split.snapshot_sampling_client()
    with pytest.raises(UnsupportedError, match="set rollout_engine: vllm"):
        await client.sample_async(types.ModelInput.from_ints([1, 2, 3]), 1, types.SamplingParams(max_tokens=2))
