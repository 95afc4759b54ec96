"""Tinker's SDK beyond its first example: futures that are clients, inflight weights, travelling samplers."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.request import url2pathname

import pytest
import tinker

from nat_plugin_evsys import SamplingClient, ServiceClient, TrainingClient, types
from nat_plugin_evsys.errors import CheckpointError, ConfigError

PROMPT = types.ModelInput.from_ints(list(range(40, 52)))


def test_a_future_of_a_client_is_an_instance_of_it(service: ServiceClient, tiny_model: str) -> None:
    training = service.create_lora_training_client(tiny_model, 2)
    assert isinstance(training, TrainingClient)
    assert isinstance(training, tinker.APIFuture)
    assert not isinstance(training, SamplingClient)
    sampling = training.save_weights_and_get_sampling_client()
    assert isinstance(sampling, SamplingClient)
    assert not isinstance(sampling, TrainingClient)
    path = training.save_state("s").result().path
    assert isinstance(service.create_training_client_from_state(path), TrainingClient)
    assert isinstance(training.create_sampling_client(path), SamplingClient)


@pytest.mark.parametrize("config", [None, types.RetryConfig(), types.RetryConfig(enable_retry_logic=False)])
async def test_a_retry_config_is_taken_by_the_four_calls(client: TrainingClient, config: Any) -> None:
    path = client.save_weights_for_sampler("s").result().path
    made = [
        client.create_sampling_client(path, retry_config=config),
        client.save_weights_and_get_sampling_client(retry_config=config),
    ]
    assert [sampling.result().policy_version for sampling in made] == [0, 0]
    assert (await client.create_sampling_client_async(path, retry_config=config)).policy_version == 0
    assert (await client.save_weights_and_get_sampling_client_async(retry_config=config)).policy_version == 0


def test_inflight_clients_move_on_and_snapshots_do_not(client: TrainingClient, train: Any) -> None:
    snapshot = client.save_weights_and_get_sampling_client().result()
    first = client.save_weights_and_get_sampling_client(kind="inflight").result()
    train(client, 0, 2)
    assert [first.policy_version, snapshot.policy_version] == [0, 0]
    second = client.save_weights_and_get_sampling_client(kind="inflight").result()
    assert [first.policy_version, second.policy_version, snapshot.policy_version] == [2, 2, 0]
    old, new, also_new = (one.compute_logprobs(PROMPT).result() for one in (snapshot, first, second))
    assert new == also_new != old
    params = types.SamplingParams(max_tokens=4, temperature=0)
    assert first.sample(PROMPT, 1, params).result().policy_version == 2


SAMPLE = """
import pickle, sys
from nat_plugin_evsys import types
client = pickle.loads(bytes.fromhex(sys.argv[1]))
print(client.policy_version, client.compute_logprobs(types.ModelInput.from_ints(list(range(40, 52)))).result())
"""


@pytest.mark.parametrize("saved", [True, False])
def test_a_pickled_sampler_samples_from_the_same_weights_in_another_process(
    client: TrainingClient, train: Any, saved: bool
) -> None:
    train(client, 0, 2)
    sampling = client.save_weights_and_get_sampling_client("named" if saved else None).result()
    data = pickle.dumps(sampling)
    train(client, 2, 3)  # the copies stay with the weights that were pickled
    expected = sampling.compute_logprobs(PROMPT).result()
    here = pickle.loads(data)
    assert here.policy_version == sampling.policy_version == 2
    assert here.compute_logprobs(PROMPT).result() == pytest.approx(expected, abs=1e-6)
    command = [sys.executable, "-W", "ignore", "-c", SAMPLE, data.hex()]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    version, _, values = shown.partition(" ")
    assert version == "2"
    assert eval(values) == pytest.approx(expected, abs=1e-6)


def test_a_sampler_handle_is_text_and_opens_any_number_of_times(service: ServiceClient, tiny_model: str) -> None:
    base = service.create_sampling_client(base_model=tiny_model).result()
    opened = [SamplingClient.from_sampler_handle(base.get_sampler_handle(), api_key="k") for _ in range(2)]
    for one in opened:
        assert one.policy_version == -1
        assert one.compute_logprobs(PROMPT).result() == base.compute_logprobs(PROMPT).result()


def test_weights_kept_for_a_pickle_are_gone_after_their_day(
    client: TrainingClient, service: ServiceClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = client.save_weights_and_get_sampling_client().result().get_sampler_handle()
    (kept,) = service.list_checkpoints()
    assert kept.expires_at is not None
    import time

    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 25 * 3600)
    with pytest.raises(CheckpointError, match="expired"):
        SamplingClient.from_sampler_handle(handle)


def test_external_weights_have_a_url_for_each_file(client: TrainingClient, service: ServiceClient) -> None:
    path = client.save_weights_external("merged", ttl_seconds=7200).result().path
    assert path.endswith("/external_weights/merged")
    rest = service.create_rest_client()
    answer = rest.get_external_weights_urls(path).result()
    directory = rest.get_checkpoint_directory(path).result()
    assert {url2pathname(url.removeprefix("file://")) for url in answer.urls.values()} == {
        str(directory / name) for name in answer.urls
    }
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(answer.urls)
    other = client.save_state("state").result().path
    with pytest.raises(ConfigError, match="was not saved by save_weights_external"):
        rest.get_external_weights_urls(other).result()


def test_the_files_of_a_checkpoint_as_loops_lists_them(
    client: TrainingClient, service: ServiceClient, train: Callable[..., Any]
) -> None:
    paths = [client.save_state("a").result().path, client.save_weights_for_sampler("b").result().path]
    listed = service.list_checkpoints()
    assert [one.tinker_path for one in listed] == paths[::-1]
    assert service.list_checkpoints(client.model_id) == listed
    files = service.get_checkpoint_archive_url(listed[0])
    assert isinstance(files, types.CheckpointFilesResponse)
    assert (files.total_count, files.next_page_token) == (len(files.presigned_urls), None)
    assert service.get_checkpoint_archive_url(listed[0].tinker_path) == files
    for file in files.presigned_urls:
        path = Path(url2pathname(file.url.removeprefix("file://")))
        assert (path.name, path.stat().st_size, file.node_rank) == (file.relative_file_name, file.size_bytes, 0)
    with pytest.raises(CheckpointError, match="does not exist"):
        service.get_checkpoint_archive_url(paths[0] + "x")
