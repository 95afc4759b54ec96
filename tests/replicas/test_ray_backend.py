"""Replicas on a real Ray cluster against the engine in this process (`make test-ray`)."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from random_datums import related_datums
from tinker import types
from torch import Tensor

from nat_plugin_evsys.backends.local import LocalBackend
from nat_plugin_evsys.backends.ray import RayBackend
from nat_plugin_evsys.config.ray import RayConfig
from nat_plugin_evsys.errors import ConfigError, DataError

ray = pytest.importorskip("ray", reason="needs Ray: make test-ray")

pytestmark = pytest.mark.asyncio(loop_scope="module")

BASE = "builtin/tiny"
STEPS = 4
ADAM = types.AdamParams(learning_rate=1e-2)
PROMPT = types.ModelInput.from_ints(list(range(5, 60)))


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, object_store_memory=80 << 20, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def local(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalBackend]:
    backend = await LocalBackend.create(BASE, rank=4, checkpoint_dir=tmp_path_factory.mktemp("local"))
    yield backend
    await backend.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def replicated(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RayBackend]:
    directory = tmp_path_factory.mktemp("ray")
    backend = await RayBackend.start(BASE, RayConfig(replicas=2), rank=4, checkpoint_dir=directory)
    await backend.save_full_state("fresh")
    yield backend
    await backend.close()


async def test_the_replicas_say_what_they_compute_in(replicated: RayBackend) -> None:
    assert {row["dtype"] for row in await asyncio.to_thread(replicated.replicas)} == {"float32"}
    assert replicated.base.dtype == torch.float32


def weights(backend: LocalBackend) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in backend._model.adapter.named_tensors()}


async def train(backend: LocalBackend, *, killing: list[int] | None = None) -> list[types.ForwardBackwardOutput]:
    """Some steps. ``killing``: processes of replicas, one of which is killed in each of the first steps."""
    outputs = []
    for step in range(STEPS):
        work = backend.forward_backward_async(related_datums(step, "ppo", count=9), loss_fn="ppo")
        if killing:
            os.kill(killing.pop(), signal.SIGKILL)
        outputs.append(await work)
        await backend.optim_step_async(ADAM)
    return outputs


async def restart(backend: RayBackend) -> None:
    await backend.load_state(str(backend.checkpoint_dir / "fresh"), with_optimizer=True)


def relative(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    difference = torch.stack([(found[name] - expected[name]).norm() for name in expected]).norm()
    return float(difference / torch.stack([tensor.norm() for tensor in expected.values()]).norm())


async def test_gradients_and_outputs_are_those_of_one_process(local: LocalBackend, replicated: RayBackend) -> None:
    for step in range(2):  # the second one with B that is not zero
        data = related_datums(step, "ppo", count=9)
        expected = await local.forward_backward_async(data, loss_fn="ppo")
        found = await replicated.forward_backward_async(data, loss_fn="ppo")
        assert local._model.gradient is not None
        assert replicated._model.gradient is not None
        assert relative(dict(replicated._model.gradient), dict(local._model.gradient)) < 1e-5
        for mine, theirs in zip(found.loss_fn_outputs, expected.loss_fn_outputs, strict=True):
            assert torch.allclose(mine["logprobs"].to_torch(), theirs["logprobs"].to_torch(), atol=1e-4)
        assert found.metrics["loss:sum"] == pytest.approx(expected.metrics["loss:sum"], rel=1e-4, abs=1e-5)
        assert found.metrics["entropy:mean"] == pytest.approx(expected.metrics["entropy:mean"], rel=1e-4)
        assert found.metrics["datum_tokens:sum"] == expected.metrics["datum_tokens:sum"]
        assert found.metrics["replicas:max"] == 2
        assert 1 <= found.metrics["replica_imbalance:max"] < 2
        for backend in (local, replicated):
            await backend.optim_step_async(ADAM)
    base_expected, base_found = await local.base_logprobs_async(data), await replicated.base_logprobs_async(data)
    for mine, theirs in zip(base_found, base_expected, strict=True):
        assert torch.allclose(mine.to_torch(), theirs.to_torch(), atol=1e-4)


async def test_the_same_steps_give_the_same_bits(replicated: RayBackend) -> None:
    found = []
    for _ in range(2):
        await restart(replicated)
        await train(replicated)
        found.append(weights(replicated))
    assert all(torch.equal(found[0][name], tensor) for name, tensor in found[1].items())


async def test_a_replica_killed_in_a_call_is_started_again_and_nothing_is_lost_or_done_twice(
    replicated: RayBackend,
) -> None:
    await restart(replicated)
    await train(replicated)
    unbroken, steps = weights(replicated), replicated.step
    await restart(replicated)
    before = await asyncio.to_thread(replicated.replicas)
    outputs = await train(replicated, killing=[member["pid"] for member in before])
    assert replicated.step == steps
    assert all(torch.equal(unbroken[name], tensor) for name, tensor in weights(replicated).items())
    after = await asyncio.to_thread(replicated.replicas)
    assert not {member["pid"] for member in before} & {member["pid"] for member in after}
    assert outputs[-1].metrics["replica_restarts:max"] >= 2


async def test_samples_are_those_of_one_process(local: LocalBackend, replicated: RayBackend) -> None:
    path = await replicated.save_for_sampler("sampled")
    mine, theirs = await replicated.sampling_client(path), await local.sampling_client(path)
    params = types.SamplingParams(max_tokens=12, seed=3, temperature=0.7)
    streamed: dict[int, list[int]] = {}
    found = await mine.sample_async(
        PROMPT,
        3,
        params,
        include_prompt_logprobs=True,
        on_tokens=lambda i, ids, _: streamed.setdefault(i, []).extend(ids),
    )
    expected = await theirs.sample_async(PROMPT, 3, params, include_prompt_logprobs=True)
    assert [s.tokens for s in found.sequences] == [s.tokens for s in expected.sequences]
    assert [s.text for s in found.sequences] == [s.text for s in expected.sequences]  # type: ignore[attr-defined]
    assert streamed == {index: sequence.tokens for index, sequence in enumerate(found.sequences)}
    assert found.prompt_logprobs[1:] == pytest.approx(expected.prompt_logprobs[1:], abs=1e-4)
    assert mine.policy_version == theirs.policy_version


async def test_a_form_that_is_asked_for_is_followed_on_a_replica(replicated: RayBackend) -> None:
    client = await replicated.snapshot_sampling_client()
    constraint = client.grammars.compile('start: "yes" | "no"', [])
    sampled = await client.sample_async(PROMPT, 2, types.SamplingParams(max_tokens=8, seed=0), constraint=constraint)
    assert {sequence.text for sequence in sampled.sequences} <= {"yes", "no"}  # type: ignore[attr-defined]


async def test_requests_are_shared_out_and_one_prefix_is_read_once(replicated: RayBackend) -> None:
    client = await replicated.snapshot_sampling_client()
    params = types.SamplingParams(max_tokens=1, seed=0)
    hits = [(await client.sample_async(PROMPT, 1, params)).prompt_cache_hit_tokens for _ in range(3)]
    assert hits[0] == 0
    assert min(hits[1:]) > 32


async def test_errors_are_those_of_one_process_and_change_nothing(replicated: RayBackend) -> None:
    with pytest.raises(DataError, match="empty list"):
        await replicated.forward_backward_async([], loss_fn="ppo")
    client = await replicated.snapshot_sampling_client()
    with pytest.raises(DataError, match="prompt is empty"):
        await client.sample_async(types.ModelInput.from_ints([]), 1, types.SamplingParams())
    assert await replicated.is_healthy()


async def test_a_cluster_that_is_too_small_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="replicas: 3 with 1 CPU each needs 3 CPU, and the cluster has"):
        await RayBackend.start(BASE, RayConfig(replicas=3), checkpoint_dir=tmp_path)
    with pytest.raises(ConfigError, match="replicas: 1 with 1 GPU each needs 1 GPU, and the cluster has 0 free"):
        await RayBackend.start(BASE, RayConfig(replicas=1, gpus_per_replica=1), checkpoint_dir=tmp_path)


async def test_cancelled_work_leaves_no_gradient(replicated: RayBackend) -> None:
    await replicated.discard_gradient_async()
    task = asyncio.ensure_future(_awaited(replicated))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(DataError, match="no gradient"):
        await replicated.optim_step_async(ADAM)


async def _awaited(backend: RayBackend) -> Any:
    return await backend.forward_backward_async(related_datums(1, "ppo", count=400, longest=200), loss_fn="ppo")
