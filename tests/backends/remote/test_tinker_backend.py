"""TinkerBackend over a real server in another process, beside LocalBackend on the same model."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from random_datums import datum
from serve_process import ServerProcess, start_server
from tinker import types
from tiny import save_byte_model

from nat_plugin_evsys.backends.base import Backend, SamplingClient
from nat_plugin_evsys.backends.remote.backend import TinkerBackend
from nat_plugin_evsys.backends.remote.service import TinkerService
from nat_plugin_evsys.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    EngineClosedError,
    ModelError,
    PromptTooLongError,
    ServiceCheckpointError,
    ServiceDataError,
    ServiceError,
    UnsupportedError,
)
from nat_plugin_evsys.types import SamplingParams

ADAM = types.AdamParams(learning_rate=1e-2)
KEY = "tml-local"
PROMPT = types.ModelInput.from_ints(list(b"Hello, "))


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    process = start_server(tiny_model, tmp_path_factory.mktemp("service") / "store")
    yield process
    process.stop()


@pytest_asyncio.fixture
async def remote(server: ServerProcess, tiny_model: Path, tmp_path: Path) -> AsyncIterator[Callable[..., Any]]:
    """``await remote(**options of TinkerBackend.create)``; all are closed at the end."""
    made: list[TinkerBackend] = []

    async def make(**options: Any) -> TinkerBackend:
        options = {"service": TinkerService(server.url, KEY), "checkpoint_dir": tmp_path, "rank": 4, **options}
        made.append(await TinkerBackend.create(str(tiny_model), **options))
        return made[-1]

    yield make
    for backend in made:
        await backend.close()


async def train(backend: Backend, make_datums: Any, steps: int, first: int = 0) -> list[float]:
    losses = []
    for step in range(first, first + steps):
        # Both are submitted before the first is awaited.
        forward_backward = backend.forward_backward_async(make_datums(step % 3), loss_fn="cross_entropy")
        optim_step = backend.optim_step_async(ADAM)
        losses.append((await forward_backward).metrics["loss:sum"])
        await optim_step
    return losses


async def greedy(client: SamplingClient, max_tokens: int = 12) -> list[list[tuple[int, float]]]:
    """The two likeliest tokens at each position, the likelier of which was sampled, with their logprobs."""
    params = types.SamplingParams(max_tokens=max_tokens, temperature=0.0, stop=[])
    sequence = (await client.sample_async(PROMPT, 1, params, topk_sample_logprobs=2)).sequences[0]
    assert sequence.topk_logprobs is not None
    assert sequence.tokens == [position[0][0] for position in sequence.topk_logprobs]
    return [list(position) for position in sequence.topk_logprobs]


def same(one: list[list[tuple[int, float]]], other: list[list[tuple[int, float]]]) -> bool:
    """The same tokens, and logprobs up to rounding, until two tokens are equally likely to rounding."""
    for a, b in zip(one, other, strict=True):
        if [value for _, value in a] != pytest.approx([value for _, value in b], abs=1e-4):
            return False
        if a[0][0] != b[0][0]:
            return a[0][1] - a[1][1] <= 1e-4 and {token for token, _ in a} == {token for token, _ in b}
    return True


async def test_it_is_a_backend_and_has_the_numbers_of_the_embedded_engine(
    remote: Any, make_backend: Any, make_datums: Any
) -> None:
    backend, local = await remote(seed=5), await make_backend(seed=5)
    assert isinstance(backend, Backend)
    assert await backend.is_healthy()
    assert backend.get_tokenizer().decode(backend.get_tokenizer().encode("Hi")) == "Hi"
    losses = await train(backend, make_datums, 6)
    assert losses == pytest.approx(await train(local, make_datums, 6), rel=1e-5)
    assert losses[3] < 0.9 * losses[0]
    forward = await backend.forward_async(make_datums(0), loss_fn="cross_entropy")
    assert forward.metrics["loss:sum"] < losses[3]

    sampled = await greedy(await backend.snapshot_sampling_client())
    assert same(sampled, await greedy(await local.snapshot_sampling_client()))


async def test_a_custom_loss_has_the_gradient_of_the_embedded_engine(
    remote: Any, make_backend: Any, make_datums: Any
) -> None:
    def loss(data: list[Any], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        total = sum(((row * row).sum() for row in logprobs), start=torch.zeros(()))
        return total, {"rows:mean": float(len(data))}

    results = []
    for backend in (await remote(), await make_backend()):
        output = await backend.forward_backward_custom_async(make_datums(1, count=4), loss)
        assert output.metrics["rows:mean"] == 4.0
        step = await backend.optim_step_async(ADAM)
        after = await backend.forward_async(make_datums(1), loss_fn="cross_entropy")
        results.append((output.metrics["loss:sum"], step.metrics["grad_norm"], after.metrics["loss:sum"]))
    assert results[0] == pytest.approx(results[1], rel=1e-4)


async def test_the_base_models_logprobs_are_those_of_the_embedded_engine(
    remote: Any, make_backend: Any, make_datums: Any
) -> None:
    backend, local = await remote(seed=5), await make_backend(seed=5)
    before = await local.forward_async(make_datums(0), loss_fn="cross_entropy")
    await train(backend, make_datums, 2)
    await train(local, make_datums, 2)
    rows = make_datums(0)[0].model_input.length
    half = types.TensorData(data=[0.5] * rows, dtype="float32", shape=[rows])
    for inputs in ({}, {"temperature": half}, {"advantages": half, "logprobs": half}):
        data = [types.Datum(each.model_input, {**each.loss_fn_inputs, **inputs}) for each in make_datums(0)]
        found, expected = [await each.base_logprobs_async(data) for each in (backend, local)]
        for one, other, fresh in zip(found, expected, before.loss_fn_outputs, strict=True):
            assert one.tolist() == pytest.approx(other.tolist(), abs=1e-4)
            assert ("temperature" in inputs) != (other.tolist() == pytest.approx(fresh["logprobs"].tolist(), abs=1e-5))


async def test_the_base_models_logprobs_are_those_of_the_targets_up_to_the_end_of_the_context(
    remote: Any, make_backend: Any
) -> None:
    backend, local = await remote(), await make_backend()
    ids = [i % 200 for i in range(backend.context_length)]
    following, another = [*ids[1:], 5], [*ids[1:3], 7, *ids[4:], 5]
    data = [datum(ids, {"target_tokens": targets}) for targets in (following, another)]
    found, expected = [await each.base_logprobs_async(data) for each in (backend, local)]
    for one, other in zip(found, expected, strict=True):
        assert one.tolist() == pytest.approx(other.tolist(), abs=1e-4)
    assert found[0].tolist()[2] != pytest.approx(found[1].tolist()[2], abs=1e-4)


async def test_a_checkpoint_with_the_optimizer_goes_on_as_if_nothing_had_been(remote: Any, make_datums: Any) -> None:
    first = await remote()
    await train(first, make_datums, 2)
    path = await first.save_full_state("two")
    assert path.startswith("tinker://")
    assert path.endswith("/weights/two")
    expected = await train(first, make_datums, 3, first=2)

    second = await remote(train=False)
    await second.load_state(path, with_optimizer=True)
    assert await train(second, make_datums, 3, first=2) == pytest.approx(expected, rel=1e-6)
    third = await remote(train=False)
    await third.load_state(path)
    without = await train(third, make_datums, 3, first=2)
    assert without[0] == pytest.approx(expected[0], rel=1e-6)
    assert without[2] != pytest.approx(expected[2], rel=1e-6)


async def test_serving_a_checkpoint_makes_no_adapter(remote: Any, make_datums: Any) -> None:
    trained = await remote()
    await train(trained, make_datums, 3)
    path = await trained.save_for_sampler("three")
    assert path.endswith("/sampler_weights/three")
    expected = await greedy(await trained.snapshot_sampling_client())
    serving = await remote(train=False)
    client = await serving.sampling_client(path)
    assert same(await greedy(client), expected)
    assert client.policy_version == 0
    base = await greedy(await serving.snapshot_sampling_client())
    assert not same(base, expected)
    assert serving._session.training_client is None
    fresh = await remote()
    assert same(await greedy(await fresh.snapshot_sampling_client()), base)


async def test_sampling_from_a_training_checkpoint_leaves_the_training_alone(remote: Any, make_datums: Any) -> None:
    backend = await remote()
    await train(backend, make_datums, 2)
    path = await backend.save_full_state("two")
    expected = await greedy(await backend.snapshot_sampling_client())
    before = await train(backend, make_datums, 2, first=2)
    assert (await backend.snapshot_sampling_client()).policy_version == 4
    client = await backend.sampling_client(path)
    assert same(await greedy(client), expected)
    assert (client.policy_version, backend.policy_version) == (2, 4)
    assert (await backend.forward_async(make_datums(2), loss_fn="cross_entropy")).metrics["loss:sum"] < before[0]
    with pytest.raises(CheckpointError, match="lora_rank 4, not 8"):
        await (await remote(rank=8)).sampling_client(path)


async def test_a_gradient_is_discarded_by_a_step_that_moves_nothing(remote: Any, make_datums: Any) -> None:
    backend, other = await remote(seed=5), await remote(seed=5)
    assert backend.progress is None
    await backend.discard_gradient_async()  # there is none
    await backend.forward_backward_async(make_datums(0), loss_fn="cross_entropy")
    await backend.discard_gradient_async()
    losses = []
    for each in (backend, other):
        losses.append((await each.forward_async(make_datums(1), loss_fn="cross_entropy")).metrics["loss:sum"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    with pytest.raises(ServiceError, match="no gradient has accumulated"):
        await backend.optim_step_async(ADAM)


async def test_a_discarded_gradient_does_not_turn_the_next_step(remote: Any, make_datums: Any) -> None:
    """Moments that had taken it in would move the weights by it later."""
    backend, other = await remote(seed=5), await remote(seed=5)
    losses = []
    for each in (backend, other):
        await train(each, make_datums, 2)
        if each is backend:
            await each.forward_backward_async(make_datums(7), loss_fn="cross_entropy")
            await each.discard_gradient_async()
        losses.append(await train(each, make_datums, 3, first=2))
    # the step count, which corrects the moments for their start at 0, is one ahead
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)


async def test_samples_are_exact_and_versions_count(remote: Any, make_datums: Any) -> None:
    backend = await remote()
    seen: list[tuple[int, list[int], list[float]]] = []
    first = await backend.snapshot_sampling_client()
    params = types.SamplingParams(max_tokens=6, seed=3, stop=[])
    await greedy(first)  # from now on the prompt is kept, so that the same request is the same computation
    response = await first.sample_async(
        PROMPT, 3, params, topk_sample_logprobs=2, on_tokens=lambda *seen_now: seen.append(seen_now)
    )
    assert [(s.tokens, s.logprobs) for s in response.sequences] == [(tokens, logprobs) for _, tokens, logprobs in seen]
    assert [index for index, _, _ in seen] == [0, 1, 2]
    assert response.sequences[0].topk_logprobs_np.token_ids.shape == (6, 2)
    for sequence in response.sequences:
        whole = types.ModelInput.from_ints(PROMPT.to_ints() + sequence.tokens)
        logprobs = await first.compute_logprobs_async(whole)
        assert logprobs[PROMPT.length :] == pytest.approx(sequence.logprobs, abs=1e-4)

    await train(backend, make_datums, 2)
    second = await backend.snapshot_sampling_client()
    named = await backend.snapshot_sampling_client("named")
    assert [first.policy_version, second.policy_version, named.policy_version] == [0, 2, 2]
    assert backend.policy_version == 2
    assert same(await greedy(second), await greedy(named))
    assert (await first.sample_async(PROMPT, 3, params)).sequences[0].tokens == seen[0][1]


async def test_concurrent_saves_have_the_steps_that_were_submitted_before_each(remote: Any, make_datums: Any) -> None:
    backend = await remote()
    first = backend.optim_step_async(ADAM)  # refused, there being no gradient, and not counted
    paths, clients = [], []
    for step in range(2):
        backend.forward_backward_async(make_datums(step), loss_fn="cross_entropy")
        backend.optim_step_async(ADAM)
        paths += [
            asyncio.ensure_future(save(f"v{step}")) for save in (backend.save_for_sampler, backend.save_full_state)
        ]
        clients.append(asyncio.ensure_future(backend.snapshot_sampling_client()))
        await asyncio.sleep(0)  # they are submitted, and wait
    with pytest.raises(ServiceError, match="no gradient has accumulated"):
        await first
    assert [client.policy_version for client in await asyncio.gather(*clients)] == [1, 2]
    opened = [await backend.sampling_client(path) for path in await asyncio.gather(*paths)]
    assert [client.policy_version for client in opened] == [1, 1, 2, 2]


async def test_the_context_is_enforced_here(remote: Any) -> None:
    backend = await remote(context_length=10)
    client = await backend.snapshot_sampling_client()
    params = types.SamplingParams(max_tokens=100, stop=[])
    response = await client.sample_async(PROMPT, 1, params)
    assert len(response.sequences[0].tokens) == 10 - PROMPT.length
    assert response.sequences[0].stop_reason == "length"
    with pytest.raises(PromptTooLongError) as caught:
        await client.sample_async(types.ModelInput.from_ints([1] * 10), 1, params)
    assert (caught.value.prompt_tokens, caught.value.max_tokens, caught.value.context_length) == (10, 100, 10)
    longest = (await remote()).context_length
    with pytest.raises(ModelError, match=f"context_length {longest + 1}"):
        await remote(context_length=longest + 1)


async def test_what_sampling_refuses(remote: Any) -> None:
    client = await (await remote(train=False)).snapshot_sampling_client()
    with pytest.raises(DataError, match="prompt is empty"):
        await client.sample_async(types.ModelInput.from_ints([]), 1, types.SamplingParams())
    with pytest.raises(DataError, match="num_samples"):
        await client.sample_async(PROMPT, 0, types.SamplingParams())
    with pytest.raises(UnsupportedError, match="repetition_penalty"):
        await client.sample_async(PROMPT, 1, SamplingParams(repetition_penalty=1.2))


async def test_a_failure_has_the_services_words_and_leaves_the_next_operation_be(remote: Any, make_datums: Any) -> None:
    backend = await remote()
    bad = [types.Datum(types.ModelInput.from_ints([1]), {"target_tokens": [999]})]
    with pytest.raises(ServiceDataError, match=r"forward_backward: .*target_tokens\[0\] is 999") as caught:
        await backend.forward_backward_async(bad, loss_fn="cross_entropy")
    assert caught.value.category == "user"
    assert len(await train(backend, make_datums, 2)) == 2


async def test_checkpoints_that_are_not_there(remote: Any) -> None:
    backend = await remote()
    path = await backend.save_for_sampler("gone")
    state = await backend.save_full_state("gone")
    await backend.delete_checkpoint(path)
    await backend.delete_checkpoint(state)
    with pytest.raises(ServiceCheckpointError, match=path):
        await backend.sampling_client(path)
    with pytest.raises(ServiceCheckpointError, match=state):
        await backend.load_state(state, with_optimizer=True)
    with pytest.raises(CheckpointError, match="not a service's checkpoint"):
        await backend.load_state("/tmp/checkpoints/epoch-0001")
    other = await remote(rank=8)
    kept = await backend.save_full_state("rank-4")
    with pytest.raises(CheckpointError, match="lora_rank 4, not 8"):
        await other.load_state(kept)


async def test_a_closed_backend(remote: Any) -> None:
    backend = await remote()
    await backend.close()
    await backend.close()
    assert not await backend.is_healthy()
    with pytest.raises(EngineClosedError, match="optim_step"):
        backend.optim_step_async(ADAM)


async def test_a_model_that_the_service_does_not_serve(server: ServerProcess, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not serve `Qwen/Qwen3-8B`; set base_model to one of: `"):
        await TinkerBackend.create("Qwen/Qwen3-8B", service=TinkerService(server.url, KEY), checkpoint_dir=tmp_path)


async def test_a_restarted_server_a_wrong_key_and_a_tokenizer_elsewhere(tmp_path: Path, make_datums: Any) -> None:
    model, hidden = save_byte_model(tmp_path / "models" / "tiny"), tmp_path / "models" / "elsewhere"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        options = ("--port", str(free.getsockname()[1]), "--api-key", "tml-alice-0123456789")
    server = start_server(model, tmp_path / "store", *options)
    service = TinkerService(server.url, "tml-alice-0123456789")
    lora = {"service": service, "checkpoint_dir": tmp_path, "rank": 4}
    try:
        with pytest.raises(ConfigError, match=r"rejects the key from \$BOB"):
            await TinkerBackend.create(
                str(model), service=TinkerService(server.url, "tml-bob-0123456789", "$BOB"), checkpoint_dir=tmp_path
            )
        backend = await TinkerBackend.create(str(model), **lora)
        model.rename(hidden)
        with pytest.raises(ConfigError, match="set `tokenizer:` to a local directory"):
            await TinkerBackend.create(str(model), **lora)
        other = await TinkerBackend.create(str(model), tokenizer=str(hidden), **lora)
        assert other.get_tokenizer().encode("Hi") == backend.get_tokenizer().encode("Hi")
        hidden.rename(model)

        before = await train(backend, make_datums, 3)
        client = await backend.snapshot_sampling_client()
        expected = await greedy(client)
        server.kill()
        assert not await backend.is_healthy()
        training = asyncio.ensure_future(train(backend, make_datums, 3, first=3))
        sampling = asyncio.ensure_future(greedy(client))
        await asyncio.sleep(1)
        server = start_server(model, tmp_path / "store", *options)
        after = await asyncio.wait_for(training, 60)
        assert same(await asyncio.wait_for(sampling, 60), expected)
        whole = await train(await TinkerBackend.create(str(model), **lora), make_datums, 6)
        assert before + after == pytest.approx(whole, rel=1e-6)
        await backend.close()
    finally:
        server.stop()
