"""TrainingClient: futures, order, failure, results of other APIs' form, checkpoints, isolation, closing."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tinker
import torch

from nat_plugin_evsys import ServiceClient, TrainingClient, types
from nat_plugin_evsys.errors import CheckpointError, DataError, EngineClosedError

ADAM = types.AdamParams(learning_rate=1e-2)


def test_tinkers_pattern_submits_both_then_waits(client: TrainingClient, datums: Any) -> None:
    losses = []
    for _ in range(10):
        forward_backward = client.forward_backward(datums(0), "cross_entropy")
        step = client.optim_step(ADAM)
        assert isinstance(forward_backward, tinker.APIFuture)
        assert isinstance(forward_backward, types.ForwardBackwardFuture)
        losses.append(forward_backward.result(timeout=60).loss)
        assert step.result().metrics["learning_rate"] == ADAM.learning_rate
    assert losses[-1] < 0.8 * losses[0]
    assert client.policy_version == 10


async def test_a_future_is_awaited_blocked_on_and_waited_for_with_a_limit(client: TrainingClient, datums: Any) -> None:
    future = client.forward(datums(0), "cross_entropy")
    awaited = await future
    assert awaited is future.result() is await future.result_async() is await future.result_async(timeout=1)
    assert future.future().result() is await asyncio.create_task(future.coroutine()) is awaited
    slow = client.forward_backward_custom(datums(0), slow_loss(0.5))
    with pytest.raises(TimeoutError):
        await slow.result_async(timeout=0.01)
    with pytest.raises(TimeoutError):
        slow.result(timeout=0.01)
    # A limit on waiting is none on the operation.
    assert (await slow).metrics["slow"] == 1


def slow_loss(seconds: float) -> Callable[..., Any]:
    def loss(data: Any, logprobs: list[torch.Tensor]) -> Any:
        time.sleep(seconds)
        return torch.cat(logprobs).sum(), {"slow": 1}

    return loss


async def test_async_methods_return_the_future_or_wait(client: TrainingClient, datums: Any) -> None:
    future = await client.forward_backward_async(datums(0), "cross_entropy")
    step = await client.optim_step_async(ADAM, wait=True)
    assert step.done()
    assert (await future).loss > 0
    assert (await (await client.save_state_async("a"))).path.endswith("/weights/a")
    sampling_client = await client.save_weights_and_get_sampling_client_async()
    result = await sampling_client.sample_async([1, 2], 1, types.SamplingParams(max_tokens=2))
    assert result.policy_version == 1
    assert await client.get_info_async() == client.get_info()


def test_wait_gives_weavers_result(client: TrainingClient, datums: Any) -> None:
    result = client.forward_backward(datums(0), "cross_entropy", wait=True)
    assert result.done()
    output = result.result()
    metrics = result.get("result", {}).get("metrics", {})
    assert metrics["loss"] == output.average_loss == pytest.approx(output.metrics["loss:sum"] / 27)
    assert metrics.items() > output.metrics.items()
    assert "loss" not in output.metrics
    assert result["result"]["loss_fn_outputs"] is output.loss_fn_outputs
    assert output["metrics"] is output.metrics
    assert output.get("nothing", 5) == 5
    with pytest.raises(KeyError):
        output["of"]
    with pytest.raises(DataError, match="empty list"):
        client.forward_backward([], "cross_entropy", wait=True)


def test_operations_run_in_submission_order_and_a_failure_is_its_own(
    make_client: Callable[..., TrainingClient], datums: Any, probe: Any
) -> None:
    eager, serial = make_client(), make_client()
    futures: list[Any] = []
    for step in range(5):
        futures.append(eager.forward_backward(datums(step), "cross_entropy"))
        bad = eager.forward_backward(datums(step), "hinge")
        futures.append(eager.optim_step(ADAM))
        serial.forward_backward(datums(step), "cross_entropy").result()
        serial.optim_step(ADAM).result()
        with pytest.raises(DataError, match="hinge"):
            bad.result()
    assert [future.result().metrics["step"] for future in futures[1::2]] == [1, 2, 3, 4, 5]
    assert probe(eager) == probe(serial)


def test_what_is_changed_after_submitting_changes_nothing(
    make_client: Callable[..., TrainingClient], datums: Any, probe: Any
) -> None:
    client, other = make_client(), make_client()
    gate = threading.Event()
    held = client.forward_backward_custom(datums(9), lambda d, lp: (gate.wait(), (torch.cat(lp).sum() * 0, {}))[1])
    data, config = datums(0), {"beta": 0.1}
    rl = [
        types.Datum(d.model_input, {**d.loss_fn_inputs, "logprobs": [-1.0] * 9, "advantages": [1.0] * 9}) for d in data
    ]
    passed = list(rl)
    submitted = client.forward_backward(passed, "dro", config)
    passed.clear()
    config["beta"] = 99.0
    gate.set()
    held.result()
    assert submitted.result().loss == other.forward_backward(rl, "dro", {"beta": 0.1}).result().loss


def test_training_clients_over_one_base_are_isolated(
    service: ServiceClient, make_client: Callable[..., TrainingClient], datums: Any, probe: Any, train: Any
) -> None:
    """Trained at once from threads of their own, each ends as it does alone; and the base is loaded once."""
    alone = make_client(seed=1)
    expected = train(alone, 0, 4)
    quiet, one, two = make_client(seed=3), make_client(seed=1), make_client(seed=2, rank=8)
    before = probe(quiet)
    losses: dict[str, Any] = {}
    threads = [
        threading.Thread(target=lambda: losses.update(one=train(one, 0, 4))),
        threading.Thread(target=lambda: losses.update(two=train(two, 0, 4))),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert losses["one"] == expected
    assert losses["two"] != expected
    assert probe(one) == probe(alone)
    assert probe(quiet) == before
    assert len({id(each._shared.base.model) for each in (alone, quiet, one, two)}) == 1
    assert len(service._bases.loaded()) == 1


def test_resume_with_the_optimizer_is_bit_for_bit_and_without_is_not(
    service: ServiceClient, make_client: Callable[..., TrainingClient], train: Any, probe: Any
) -> None:
    straight = make_client()
    train(straight, 0, 6)
    first = make_client()
    train(first, 0, 3)
    path = first.save_state("mid").result().path
    resumed = service.create_training_client_from_state_with_optimizer(path).result()
    weights_only = service.create_training_client_from_state(path).result()
    loaded = make_client(seed=7)
    loaded.load_state_with_optimizer(path).result()
    for each in (resumed, weights_only, loaded):
        assert each.policy_version == 3
        train(each, 3, 6)
    assert probe(resumed) == probe(loaded) == probe(straight)
    assert probe(weights_only) != probe(straight)
    info = resumed.get_info()
    assert (info.lora_rank, info.model_data.lora_rank, info.model_data.model_id) == (4, 4, resumed.model_id)


def test_from_state_takes_over_rank_and_layers(
    service: ServiceClient, make_client: Callable[..., TrainingClient], probe: Any
) -> None:
    client = make_client(rank=3, train_mlp=False, train_unembed=False)
    path = client.save_state("a").result().path
    again = service.create_training_client_from_state(path).result()
    assert probe(again) == probe(client)
    assert (again.record.lora_rank, again.record.train_attn, again.record.train_mlp, again.record.train_unembed) == (
        3,
        True,
        False,
        False,
    )


def test_overwrite_replaces_and_a_sampler_checkpoint_is_a_peft_directory(
    service: ServiceClient, client: TrainingClient, train: Any, store: Path
) -> None:
    first = client.save_state("a", ttl_seconds=3600, user_metadata={"loss": "1"}).result()
    train(client, 0, 1)
    with pytest.raises(CheckpointError, match="exists; choose another name"):
        client.save_state("a").result()
    assert client.save_state("a", overwrite=True).result() == first
    rest = service.create_rest_client()
    (checkpoint,) = rest.list_checkpoints(client.model_id).result().checkpoints
    assert (checkpoint.user_metadata, checkpoint.expires_at) == (None, None)
    path = client.save_weights_for_sampler("s").result().path
    assert path == f"tinker://{client.model_id}/sampler_weights/s"
    directory = rest.get_checkpoint_directory(path).result()
    assert directory == store / client.model_id / "sampler_weights" / "s"
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {file.name for file in directory.iterdir()}


def test_cancelling_stops_an_operation_and_the_next_one_runs(client: TrainingClient, datums: Any) -> None:
    gate = threading.Event()

    def hold(data: Any, logprobs: list[torch.Tensor]) -> Any:
        gate.wait()
        return torch.cat(logprobs).sum(), {}

    running = client.forward_backward_custom(datums(0), hold)
    queued = client.forward(datums(0), "cross_entropy")
    queued.cancel()
    gate.set()
    running.result()
    assert queued.future().cancelled()
    assert client.forward(datums(0), "cross_entropy").result().loss > 0


def test_close_fails_what_is_queued_and_frees_the_adapter(
    make_client: Callable[..., TrainingClient], datums: Any, train: Any
) -> None:
    client = make_client()
    train(client, 0, 1)
    sampling_client = client.save_weights_and_get_sampling_client().result()
    model = client._model()
    assert model is not None
    tensors = [weakref.ref(t) for t in model.parameters.values()]
    del model
    gate = threading.Event()
    held = client.forward_backward_custom(datums(0), lambda d, lp: (gate.wait(5), (torch.cat(lp).sum(), {}))[1])
    queued = client.optim_step(ADAM)
    closing = threading.Thread(target=client.close)
    closing.start()
    gate.set()
    closing.join()
    client.close()
    with pytest.raises(EngineClosedError):
        queued.result()
    held.future().exception(timeout=10)
    del held, queued
    gc.collect()
    assert all(ref() is None for ref in tensors)
    result = sampling_client.sample([1, 2], 1, types.SamplingParams(max_tokens=2)).result()
    assert result.policy_version == 1


def test_a_client_nobody_refers_to_goes_once_its_work_is_done(
    service: ServiceClient, tiny_model: str, datums: Any
) -> None:
    client = service.create_lora_training_client(tiny_model, 2).result()
    thread = client._queue._operations._thread
    gone = weakref.ref(client)
    gate = threading.Event()
    last = client.forward_backward_custom(datums(0), lambda d, lp: (gate.wait(), (torch.cat(lp).sum(), {}))[1])
    del client
    gc.collect()
    assert gone() is not None  # its operation still runs
    gate.set()
    assert last.result().loss != 0
    deadline = time.monotonic() + 10
    while thread.is_alive() and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert gone() is None
    assert not thread.is_alive()
    assert service.live_runs() == []


def test_the_future_of_a_client_may_be_used_as_the_client(service: ServiceClient, tiny_model: str, datums: Any) -> None:
    future = service.create_lora_training_client(tiny_model, rank=2)
    assert future.forward(datums(0), "cross_entropy").result().loss > 0
    assert future.model_id == future.result().model_id
    assert "TrainingClient" in repr(future)
    with pytest.raises(AttributeError, match="no attribute 'backward'"):
        future.backward()
    failing = service.create_lora_training_client("./nowhere")
    with pytest.raises(Exception, match="no such directory"):
        failing.get_tokenizer()
    assert "failed: ModelError" in repr(failing)


def test_reading_a_future_never_asks_for_its_truth(client: TrainingClient, datums: Any) -> None:
    gate = threading.Event()
    future = client.forward_backward_custom(datums(0), lambda d, lp: (gate.wait(), (torch.cat(lp).sum(), {}))[1])
    assert future
    assert repr(future) == "<ForwardBackwardFuture pending>"
    gate.set()
    future.result()


def test_a_custom_loss_is_exact(make_client: Callable[..., TrainingClient], datums: Any, probe: Any) -> None:
    named, custom = make_client(), make_client()
    for step in range(2):
        named.forward_backward(datums(step), "cross_entropy")
        output = custom.forward_backward_custom(
            datums(step), lambda data, logprobs: (-torch.cat(logprobs).sum(), {"mine": 2})
        )
        for each in (named, custom):
            each.optim_step(ADAM).result()
        assert output.result().metrics["mine"] == 2
    assert probe(named) == pytest.approx(probe(custom), abs=1e-6)


def test_a_tokenizers_settings_are_the_clients_own(make_client: Callable[..., TrainingClient]) -> None:
    one, two = make_client(), make_client()
    assert one.get_tokenizer() is one.get_tokenizer()
    one.get_tokenizer().model_max_length = 3
    assert two.get_tokenizer().model_max_length != 3
    assert two.get_tokenizer().decode(two.get_tokenizer().encode("Hi")) == "Hi"
