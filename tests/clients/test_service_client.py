"""ServiceClient and RestClient: shared base models, capabilities, paths, expiry, runs, closing."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hold import Hold

from nat_plugin_evsys import ServiceClient, TrainingClient, types
from nat_plugin_evsys.errors import CheckpointError, EngineClosedError
from nat_plugin_evsys.runtime import arguments

PARAMS = types.SamplingParams(max_tokens=4, temperature=0)


def greedy(client: Any) -> list[int]:
    return client.sample([1, 2, 3], 1, PARAMS).result().sequences[0].tokens


def test_a_base_model_is_loaded_once_however_many_ask_at_once(
    service: ServiceClient, tiny_model: str, other_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nat_plugin_evsys.runtime import bases as registry

    loads: list[str] = []
    load = registry.load_base_model

    def counted(name: str, **options: Any) -> Any:
        loads.append(name)
        time.sleep(0.05)
        return load(name, **options)

    monkeypatch.setattr(registry, "load_base_model", counted)
    spelled = str(Path(tiny_model) / ".." / Path(tiny_model).name)
    futures = [service.create_lora_training_client(name, 2) for name in (tiny_model, other_model, spelled, tiny_model)]
    clients = [future.result() for future in futures]
    assert sorted(loads) == sorted(set(loads))
    assert len(loads) == 2
    assert [client.model_id.rsplit(":", 1)[1] for client in clients] == ["0", "1", "2", "3"]


def test_capabilities_name_the_builtin_and_the_loaded_models(service: ServiceClient, client: TrainingClient) -> None:
    capabilities = service.get_server_capabilities()
    assert isinstance(capabilities, types.ServerCapabilities)
    models = {model.model_name: model for model in capabilities.supported_models}
    assert (models["builtin/tiny"].max_context_length, models["builtin/tiny"].device) == (4096, None)
    loaded = models[client.get_info().model_name]
    assert (loaded.max_context_length, loaded.device, loaded.dtype) == (256, "cpu", "float32")
    assert loaded.trainable
    assert loaded.sampleable
    assert service.create_rest_client().get_server_capabilities().result() == capabilities


async def test_every_creating_call_has_a_coroutine(service: ServiceClient, tiny_model: str) -> None:
    client = await service.create_lora_training_client_async(tiny_model, 2)
    assert isinstance(client, TrainingClient)
    assert (await service.create_model_async(tiny_model, {"rank": 2, "train_mlp": False})).record.train_mlp is False
    path = (await client.save_state("a")).path
    assert (await service.create_training_client_from_state_async(path)).policy_version == 0
    assert (await service.create_training_client_from_state_with_optimizer_async(path)).policy_version == 0
    assert (await service.create_sampling_client_async(model_path=path)).policy_version == 0
    assert (await client.create_sampling_client_async(path)).model_path == path
    assert (await service.get_server_capabilities_async()).supported_models


def test_alpha_is_32_and_the_scale_alpha_by_rank(make_client: Callable[..., TrainingClient]) -> None:
    for rank in (4, 8):
        client = make_client(rank=rank)
        model = client._model()
        assert model is not None
        assert (model.adapter.alpha, model.adapter.scale) == (32.0, 32.0 / rank)


def test_the_same_seed_gives_the_same_adapter_and_none_another(
    make_client: Callable[..., TrainingClient], train: Any, probe: Any
) -> None:
    clients = [make_client(seed=seed) for seed in (5, 5, None, None)]
    for client in clients:
        train(client, 0, 1)
    one, same, drawn, other = [probe(client) for client in clients]
    assert one == same
    assert len({tuple(one), tuple(drawn), tuple(other)}) == 3


def test_sampling_clients_by_path_directory_and_base(
    service: ServiceClient, client: TrainingClient, tiny_model: str, train: Any
) -> None:
    train(client, 0, 5)
    path = client.save_weights_for_sampler("s").result().path
    live = client.save_weights_and_get_sampling_client(name="s").result()
    assert live.model_path == path
    directory = service.create_rest_client().get_checkpoint_directory(path).result()
    saved = [
        service.create_sampling_client(model_path=path).result(),
        service.create_sampling_client(model_path=str(directory), base_model=tiny_model).result(),
        client.create_sampling_client(path).result(),
        client.create_sampling_client(client.save_state("w").result().path).result(),
    ]
    base = service.create_sampling_client(base_model=tiny_model).result()
    logprobs = [each.compute_logprobs(list(range(9))).result() for each in [live, *saved]]
    assert logprobs[1:] == logprobs[:1] * 4
    assert base.compute_logprobs(list(range(9))).result() != logprobs[0]
    assert [each.policy_version for each in [live, *saved, base]] == [5, 5, 5, 5, 5, -1]
    assert saved[0].get_base_model() == tiny_model


def test_checkpoints_are_listed_described_and_deleted(
    service: ServiceClient, make_client: Callable[..., TrainingClient], tiny_model: str
) -> None:
    rest = service.create_rest_client()
    one, two = make_client(user_metadata={"name": "one"}), make_client(train_mlp=False)
    assert rest.list_checkpoints(one.model_id).result().checkpoints == []
    paths = [
        one.save_state("a", user_metadata={"loss": "0.5"}).result().path,
        one.save_weights_for_sampler("a", ttl_seconds=7200).result().path,
        two.save_state("b").result().path,
    ]
    listed = rest.list_checkpoints(one.model_id).result().checkpoints
    assert [(c.tinker_path, c.checkpoint_id, c.checkpoint_type, c.user_metadata) for c in listed] == [
        (paths[0], "weights/a", "training", {"loss": "0.5"}),
        (paths[1], "sampler_weights/a", "sampler", None),
    ]
    assert listed[0].size_bytes > listed[1].size_bytes > 0
    assert listed[0].expires_at is None
    assert timedelta(seconds=7100) < listed[1].expires_at - datetime.now(UTC) < timedelta(seconds=7201)
    everything = rest.list_user_checkpoints(limit=2).result()
    assert [c.tinker_path for c in everything.checkpoints] == [paths[2], paths[1]]
    assert everything.cursor.total_count == 3
    assert [c.tinker_path for c in rest.list_user_checkpoints(offset=2).result().checkpoints] == [paths[0]]
    run = rest.get_training_run(one.model_id).result()
    assert (run.base_model, run.lora_rank, run.is_lora, run.user_metadata) == (tiny_model, 4, True, {"name": "one"})
    assert run.last_checkpoint == listed[0]
    assert run.last_sampler_checkpoint == listed[1]
    assert rest.get_training_run_by_tinker_path(paths[0]).result() == run
    assert {r.training_run_id for r in rest.list_training_runs().result().training_runs} == {one.model_id, two.model_id}
    info = rest.get_weights_info_by_tinker_path(paths[2]).result()
    assert (info.base_model, info.lora_rank, info.train_attn, info.train_mlp) == (tiny_model, 4, True, False)
    rest.delete_checkpoint(one.model_id, "weights/a").result()
    rest.delete_checkpoint_from_tinker_path(paths[2]).result()
    assert [c.tinker_path for c in rest.list_user_checkpoints().result().checkpoints] == [paths[1]]
    with pytest.raises(CheckpointError, match="does not exist"):
        service.create_training_client_from_state(paths[0]).result()
    with pytest.raises(CheckpointError, match="nothing to delete"):
        rest.delete_checkpoint_from_tinker_path(paths[0]).result()


async def test_rest_coroutines(service: ServiceClient, client: TrainingClient) -> None:
    rest = service.create_rest_client()
    path = (await client.save_state("a")).path
    await rest.set_checkpoint_ttl_from_tinker_path_async(path, 3600)
    (listed,) = (await rest.list_checkpoints_async(client.model_id)).checkpoints
    assert listed.expires_at is not None
    await rest.set_checkpoint_ttl_from_tinker_path_async(path, None)
    (listed,) = (await rest.list_user_checkpoints_async()).checkpoints
    assert listed.expires_at is None
    assert (await rest.get_training_run_async(client.model_id)).last_checkpoint == listed
    assert (await rest.list_training_runs_async()).cursor.total_count == 1
    await rest.delete_checkpoint_async(client.model_id, "weights/a")


def test_an_expired_checkpoint_is_refused_and_deleted(
    service: ServiceClient, client: TrainingClient, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arguments, "MIN_TTL_SECONDS", 1)
    rest = service.create_rest_client()
    seen = client.save_state("seen", ttl_seconds=1).result().path
    client.save_state("listed", ttl_seconds=1).result()
    kept = client.save_state("kept", ttl_seconds=3600).result().path
    later = client.save_state("later", ttl_seconds=1).result().path
    rest.set_checkpoint_ttl_from_tinker_path(later, None).result()
    time.sleep(1.1)
    with pytest.raises(CheckpointError, match=r"/weights/seen expired at 20\d\d-"):
        client.load_state(seen).result()
    listed = rest.list_checkpoints(client.model_id).result().checkpoints
    assert [c.tinker_path for c in listed] == [kept, later]
    assert sorted(p.name for p in (store / client.model_id / "weights").iterdir()) == ["kept", "later"]
    client.load_state(later).result()


def test_runs_and_checkpoints_outlive_the_process_that_made_them(
    store: Path, tiny_model: str, train: Any, probe: Any
) -> None:
    with ServiceClient({"by": "test"}, store=store, device="cpu") as first:
        client = first.create_lora_training_client(tiny_model, 4, user_metadata={"run": "1"}).result()
        train(client, 0, 2)
        path, expected = client.save_state("a").result().path, probe(client)
    with ServiceClient(store=store, device="cpu") as second:
        (run,) = second.create_rest_client().list_training_runs().result().training_runs
        assert (run.training_run_id, run.user_metadata) == (client.model_id, {"by": "test", "run": "1"})
        assert probe(second.create_training_client_from_state(path).result()) == expected


def test_the_store_is_below_evsys_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EVSYS_HOME", raising=False)
    assert ServiceClient().store.root == tmp_path / ".evsys" / "checkpoints"
    monkeypatch.setenv("EVSYS_HOME", str(tmp_path / "home"))
    assert ServiceClient().store.root == tmp_path / "home" / "checkpoints"
    assert list(tmp_path.iterdir()) == []


def test_close_ends_everything_and_frees_the_model(store: Path, tiny_model: str, datums: Any) -> None:
    service = ServiceClient(store=store, device="cpu")
    client = service.create_lora_training_client(tiny_model, 4).result()
    sampling_client = client.save_weights_and_get_sampling_client().result()
    endless = sampling_client.sample([1], 4, types.SamplingParams(stop=[]))
    model = weakref.ref(client._shared.base.model)
    threads = [client._queue._operations._thread]
    assert service.close("success", detail="done").result() is None
    service.close()
    with pytest.raises(EngineClosedError):
        endless.result()
    with pytest.raises(EngineClosedError):
        client.forward(datums(0), "cross_entropy")
    with pytest.raises(EngineClosedError):
        service.create_sampling_client(base_model=tiny_model)
    assert not any(thread.is_alive() for thread in threads)
    del client, sampling_client, service, endless, threads
    gc.collect()
    assert model() is None


def test_a_service_that_nobody_refers_to_frees_the_model_once_its_requests_are_done(
    store: Path, tiny_model: str
) -> None:
    hold = Hold()
    before = set(threading.enumerate())
    service = ServiceClient(store=store, device="cpu")
    sampling_client = service.create_sampling_client(base_model=tiny_model).result()
    model = weakref.ref(sampling_client._base.model)
    running = sampling_client.sample([1], 1, types.SamplingParams(max_tokens=9, stop=[]), on_tokens=hold)
    hold.wait()
    del service, sampling_client
    gc.collect()
    assert model() is not None
    hold.release()
    assert len(running.result().sequences[0].tokens) == 9
    deadline = time.monotonic() + 10
    while (model() or set(threading.enumerate()) - before) and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert model() is None
    assert not set(threading.enumerate()) - before


def test_a_client_created_while_the_service_closes_is_closed(
    store: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nat_plugin_evsys.runtime import bases as registry

    service, reached, gate = ServiceClient(store=store, device="cpu"), threading.Event(), threading.Event()
    load = registry.load_base_model

    def held(name: str, **options: Any) -> Any:
        reached.set()
        gate.wait()
        return load(name, **options)

    monkeypatch.setattr(registry, "load_base_model", held)
    future = service.create_lora_training_client(tiny_model)
    reached.wait()
    service.close()
    gate.set()
    with pytest.raises(EngineClosedError, match="has been closed"):
        future.result()
