"""A cluster of two nodes with an object store each, joined by its address (`make test-ray`)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from random_datums import related_datums
from tinker import types

from nat_plugin_evsys.backends.ray import RayBackend
from nat_plugin_evsys.config.ray import RayConfig
from nat_plugin_evsys.errors import ConfigError

ray = pytest.importorskip("ray", reason="needs Ray: make test-ray")


@pytest.fixture
def address() -> Iterator[str]:
    from ray.cluster_utils import Cluster

    size = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=size)
    cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
    yield cluster.address
    cluster.shutdown()


async def test_two_nodes_train_and_sample_together(address: str, tmp_path: Path) -> None:
    backend = await RayBackend.start("builtin/tiny", RayConfig(replicas=2, address=address), checkpoint_dir=tmp_path)
    try:
        output = await backend.forward_backward_async(related_datums(0, "ppo", count=9), loss_fn="ppo")
        await backend.optim_step_async(types.AdamParams(learning_rate=1e-3))
        client = await backend.snapshot_sampling_client()
        sampled = await client.sample_async(
            types.ModelInput.from_ints([5, 6, 7]), 2, types.SamplingParams(max_tokens=4, seed=0)
        )
        both = backend.replicas()
    finally:
        await backend.close()
    assert len({each["node"] for each in both}) == 2
    assert all(each["tokens"] > 0 for each in both)
    assert output.metrics["replicas:max"] == 2
    assert [len(sequence.tokens) for sequence in sampled.sequences] == [4, 4]
    assert not ray.is_initialized()


async def test_an_address_without_a_cluster_is_named(tmp_path: Path) -> None:
    settings = RayConfig(replicas=1, address="127.0.0.1:1")
    with pytest.raises(ConfigError, match=r"the cluster at 127\.0\.0\.1:1 cannot be used"):
        await RayBackend.start("builtin/tiny", settings, checkpoint_dir=tmp_path)
