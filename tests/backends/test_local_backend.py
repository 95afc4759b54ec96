"""LocalBackend: order, failure, cancellation, progress, saving and resuming."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tinker import types

from nat_plugin_evsys.backends.base import Backend
from nat_plugin_evsys.backends.local import LocalBackend
from nat_plugin_evsys.engine.checkpoints import list_checkpoints
from nat_plugin_evsys.engine.model.loading import BaseModel, load_base_model
from nat_plugin_evsys.engine.model.lora import LoraAdapter, applied
from nat_plugin_evsys.errors import CheckpointError, DataError, EngineClosedError, ModelError
from nat_plugin_evsys.runtime.bases import SharedBase

ADAM = types.AdamParams(learning_rate=1e-2)


def weights(backend: LocalBackend) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in backend._model.parameters.items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(10_000):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("the condition never came true")


async def train(backend: LocalBackend, make_datums: Any, first: int, last: int) -> None:
    for step in range(first, last):
        backend.forward_backward_async(make_datums(step), loss_fn="cross_entropy")
        await backend.optim_step_async(ADAM)


async def test_it_is_a_backend_and_learns(make_backend: Any, make_datums: Any) -> None:
    backend = await make_backend()
    assert isinstance(backend, Backend)
    assert await backend.is_healthy()
    assert backend.get_tokenizer().decode(backend.get_tokenizer().encode("Hi")) == "Hi"
    data = make_datums(0)
    losses = []
    for _ in range(15):
        # Both are submitted before the first is awaited.
        forward_backward = backend.forward_backward_async(data, loss_fn="cross_entropy")
        step = backend.optim_step_async(ADAM)
        losses.append((await forward_backward).metrics["loss:sum"])
        await step
    assert losses[-1] < 0.8 * losses[0]
    assert backend.step == 15
    forward = await backend.forward_async(data, loss_fn="cross_entropy")
    assert forward.metrics["loss:sum"] < losses[-1]
    assert backend._model.gradient is None


async def test_operations_run_in_submission_order(make_backend: Any, make_datums: Any) -> None:
    backend, serial = await make_backend(), await make_backend()
    futures: list[Any] = []
    for step in range(4):
        futures.append(backend.forward_backward_async(make_datums(step), loss_fn="cross_entropy"))
        futures.append(backend.optim_step_async(ADAM))
    results = await asyncio.gather(*futures)
    await train(serial, make_datums, 0, 4)
    assert equal(weights(backend), weights(serial))
    assert [r.metrics["step"] for r in results[1::2]] == [1, 2, 3, 4]


async def test_a_failure_fails_its_own_future_only(make_backend: Any, make_datums: Any) -> None:
    backend = await make_backend()
    bad = [types.Datum(types.ModelInput.from_ints([1]), {"target_tokens": [999]})]
    first = backend.forward_backward_async(make_datums(0), loss_fn="cross_entropy")
    second = backend.forward_backward_async(bad, loss_fn="cross_entropy")
    third = backend.optim_step_async(ADAM)
    with pytest.raises(DataError, match=r"target_tokens\[0\] is 999"):
        await second
    assert (await first).metrics["loss:sum"] > 0
    assert (await third).metrics["step"] == 1
    other = await make_backend()
    await train(other, make_datums, 0, 1)
    assert equal(weights(backend), weights(other))


async def test_a_future_can_be_awaited_in_any_loop_and_blocked_on(make_backend: Any, make_datums: Any) -> None:
    backend = await make_backend()
    future = backend.forward_async(make_datums(0), loss_fn="cross_entropy")

    def elsewhere() -> float:
        async def wait() -> float:
            return (await future).metrics["loss:sum"]

        return asyncio.run(wait())

    found = await asyncio.to_thread(elsewhere)
    assert future.done()
    assert future.result(timeout=1).metrics["loss:sum"] == found
    assert (await future).metrics["loss:sum"] == found


async def test_the_event_loop_is_never_blocked(make_backend: Any, make_datums: Any) -> None:
    backend = await make_backend()
    backend._model.token_budget = 64
    future = backend.forward_backward_async(make_datums(0, count=150, length=64), loss_fn="cross_entropy")
    seen, worst = set(), 0.0
    while not future.done():
        started = time.perf_counter()
        await asyncio.sleep(0.001)
        worst = max(worst, time.perf_counter() - started)
        seen.add(backend.progress)
    await future
    total = 150 * 63
    assert backend.progress == (total, total)
    assert len(seen) > 5
    assert worst < 0.5


async def test_cancelling_the_waiting_task_abandons_the_operation(make_backend: Any, make_datums: Any) -> None:
    backend = await make_backend()
    backend._model.token_budget = 64
    big = make_datums(0, count=400, length=64)

    async def job() -> None:
        await backend.forward_backward_async(big, loss_fn="cross_entropy")

    task = asyncio.create_task(job())
    await until(lambda: backend.progress[0] > 0)
    queued = backend.forward_backward_async(big, loss_fn="cross_entropy")
    queued.cancel()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await backend.forward_async(make_datums(1, 4, 12), loss_fn="cross_entropy")).metrics["loss:sum"] > 0
    assert backend.progress[1] == 4 * 11
    assert backend._model.gradient is None


async def test_discarding_the_gradient(make_backend: Any, make_datums: Any) -> None:
    backend = await make_backend()
    await backend.discard_gradient_async()  # there is none
    await backend.forward_backward_async(make_datums(0), loss_fn="cross_entropy")
    await backend.discard_gradient_async()
    with pytest.raises(DataError, match="no gradient"):
        await backend.optim_step_async(ADAM)


async def test_custom_loss(make_backend: Any, make_datums: Any) -> None:
    custom, plain = await make_backend(), await make_backend()
    data = make_datums(0)
    threads = []

    def loss(datums: Any, logprobs: Any) -> Any:
        threads.append(threading.current_thread())
        return -sum(lp.sum() for lp in logprobs), {"mine": 7.0}

    output = await custom.forward_backward_custom_async(data, loss)
    expected = await plain.forward_backward_async(data, loss_fn="cross_entropy")
    assert output.metrics["mine"] == 7.0
    assert output.metrics["loss:sum"] == pytest.approx(expected.metrics["loss:sum"], rel=1e-6)
    assert threads[0] is not threading.current_thread()
    await asyncio.gather(custom.optim_step_async(ADAM), plain.optim_step_async(ADAM))
    for name, w in weights(plain).items():
        torch.testing.assert_close(weights(custom)[name], w, rtol=1e-5, atol=1e-6)


async def test_save_and_resume(make_backend: Any, make_datums: Any, tmp_path: Path) -> None:
    straight, first, resumed, reset = [await make_backend(seed=s) for s in (1, 1, 2, 3)]
    await train(straight, make_datums, 0, 6)
    await train(first, make_datums, 0, 3)
    path = await first.save_full_state("half")
    assert path == str(tmp_path / "checkpoints" / "half")
    await resumed.load_state(path, with_optimizer=True)
    assert resumed.step == 3
    await train(resumed, make_datums, 3, 6)
    assert equal(weights(resumed), weights(straight))
    await reset.load_state(path)
    assert equal(weights(reset), weights(first))
    await train(reset, make_datums, 3, 6)
    assert not equal(weights(reset), weights(straight))


@pytest.mark.parametrize("save", ["save_for_sampler", "save_full_state"])
async def test_sampling_from_a_checkpoint_leaves_the_training_alone(
    save: str, make_backend: Any, make_datums: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = await make_backend()
    prompt = types.ModelInput.from_ints([1, 2, 3, 4])
    await train(backend, make_datums, 0, 2)
    path = await getattr(backend, save)("two")
    expected = await (await backend.snapshot_sampling_client()).compute_logprobs_async(prompt)
    await train(backend, make_datums, 2, 4)
    trained, snapshot = weights(backend), await backend.snapshot_sampling_client()

    client = await backend.sampling_client(path)
    logprobs = await client.compute_logprobs_async(prompt)
    assert logprobs[1:] == pytest.approx(expected[1:], abs=1e-5)
    assert (client.policy_version, backend.policy_version, backend.step) == (2, 4, 4)
    rested: list[Any] = []
    monkeypatch.setattr(backend._shared, "rest", rested.append)
    await backend.forward_backward_async(make_datums(4), loss_fn="cross_entropy")
    await backend.discard_gradient_async()
    assert rested == [snapshot], "which is what the next rollouts have no use for"
    assert equal(weights(backend), trained)
    with pytest.raises(CheckpointError, match=r"has LoRA rank 4, .*this model has rank 8"):
        await (await make_backend(rank=8)).sampling_client(path)

    await backend.delete_checkpoint(path)
    assert list_checkpoints(tmp_path / "checkpoints") == []
    with pytest.raises(CheckpointError, match="does not exist"):
        await backend.delete_checkpoint(path)
    with pytest.raises(CheckpointError, match="does not exist"):
        await backend.sampling_client(path)


async def test_checkpoint_dir_may_change(make_backend: Any, tmp_path: Path) -> None:
    backend = await make_backend()
    one = await backend.save_for_sampler("a", user_metadata={"epoch": 1})
    backend.checkpoint_dir = tmp_path / "elsewhere"
    two = await backend.save_for_sampler("a")
    assert Path(one) == tmp_path / "checkpoints" / "sampler_weights" / "a"
    assert Path(two) == tmp_path / "elsewhere" / "sampler_weights" / "a"
    assert [i.user_metadata for i in list_checkpoints(Path(one).parent)] == [{"epoch": 1}]
    with pytest.raises(CheckpointError, match="is refused"):
        await backend.save_full_state("../a")
    with pytest.raises(CheckpointError, match="no optimizer"):
        await backend.load_state(one, with_optimizer=True)


async def test_the_two_kinds_of_a_name_lie_in_two_places_and_none_is_overwritten(
    make_backend: Any, make_datums: Any
) -> None:
    backend = await make_backend()
    await train(backend, make_datums, 0, 2)
    state = await backend.save_full_state("a")
    await backend.save_for_sampler("a")
    await backend.snapshot_sampling_client("b")
    await train(backend, make_datums, 2, 3)
    for save in (backend.save_full_state, backend.save_for_sampler, backend.snapshot_sampling_client):
        with pytest.raises(CheckpointError, match="a exists; choose another name"):
            await save("a")
    with pytest.raises(CheckpointError, match="b exists"):
        await backend.snapshot_sampling_client("b")
    with pytest.raises(CheckpointError, match="sampler_weights exists"):
        await backend.save_full_state("sampler_weights")
    await backend.load_state(state, with_optimizer=True)
    assert backend.step == 2
    await backend.delete_checkpoint(state)
    assert await backend.save_full_state("a") == state


async def test_closing(make_backend: Any, make_datums: Any) -> None:
    backend = await make_backend()
    backend._model.token_budget = 64
    running = backend.forward_backward_async(make_datums(0, count=400, length=64), loss_fn="cross_entropy")
    queued = backend.optim_step_async(ADAM)
    await until(lambda: backend.progress[0] > 0)
    await backend.close()
    for future in (running, queued):
        with pytest.raises(EngineClosedError):
            await future
    with pytest.raises(EngineClosedError, match="create a new one"):
        backend.optim_step_async(ADAM)
    assert not await backend.is_healthy()
    await backend.close()


async def test_two_backends_share_one_base_and_learn_as_if_alone(make_backend: Any, make_datums: Any) -> None:
    alone = await make_backend(seed=1)
    await train(alone, make_datums, 0, 3)
    expected, bare = weights(alone), await make_backend(context_length=32)
    await alone.close()

    one, other = await make_backend(seed=1), await make_backend(seed=2)
    assert one.base is other.base
    assert one.base is not alone.base, "whose last user has left"
    assert one.base is not bare.base, "which has another limit"
    await asyncio.gather(train(one, make_datums, 0, 3), train(other, make_datums, 5, 9))
    assert equal(weights(one), expected)

    await one.close()
    await one.close()
    client = await other.snapshot_sampling_client()
    sampled = await client.sample_async(types.ModelInput.from_ints([1, 2]), 1, types.SamplingParams(max_tokens=3))
    assert sampled.sequences[0].tokens
    await other.close()
    with pytest.raises(EngineClosedError):
        await client.sample_async(types.ModelInput.from_ints([1, 2]), 1, types.SamplingParams(max_tokens=3))


async def test_a_backend_closes_the_base_that_it_made_and_no_other(tiny_model: Path, tmp_path: Path) -> None:
    base = load_base_model(str(tiny_model), device="cpu")
    shared = SharedBase(base)
    prompt, params = types.ModelInput.from_ints([1, 2]), types.SamplingParams(max_tokens=3)

    def backend(base: BaseModel | SharedBase) -> LocalBackend:
        adapter = LoraAdapter.create(shared.base.model, rank=2, alpha=4)
        return LocalBackend(base, adapter, checkpoint_dir=tmp_path)

    one, other, alone = backend(shared), backend(shared), backend(base)
    clients = [await each.snapshot_sampling_client() for each in (other, alone)]
    for each in (one, other, alone):
        await each.close()
    assert (await clients[0].sample_async(prompt, 1, params)).sequences[0].tokens
    with pytest.raises(EngineClosedError):
        await clients[1].sample_async(prompt, 1, params)
    shared.close()


async def test_ill_health_is_seen(make_backend: Any) -> None:
    backend = await make_backend()
    with torch.no_grad():
        backend.base.model.model.norm.weight.fill_(float("nan"))
    assert not await backend.is_healthy()


async def test_a_missing_model_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such directory"):
        await LocalBackend.create(str(tmp_path / "nope"), checkpoint_dir=tmp_path)


async def test_snapshots_count_versions_and_stay_as_they_were(
    make_backend: Any, make_datums: Any, tmp_path: Path
) -> None:
    backend = await make_backend()
    prompt = types.ModelInput.from_ints([1, 2, 3, 4])
    assert backend.policy_version == -1
    first = await backend.snapshot_sampling_client()
    before = await first.compute_logprobs_async(prompt)
    await train(backend, make_datums, 0, 3)
    second = await backend.snapshot_sampling_client("kept")
    assert (first.policy_version, second.policy_version, backend.policy_version) == (0, 3, 3)
    assert [i.path.name for i in list_checkpoints(tmp_path / "checkpoints" / "sampler_weights")] == ["kept"]
    assert await first.compute_logprobs_async(prompt) == before
    after = await second.compute_logprobs_async(prompt)
    assert after != before
    datum = types.Datum(types.ModelInput.from_ints([1, 2, 3]), {"target_tokens": [2, 3, 4]})
    trained = (await backend.forward_async([datum], loss_fn="cross_entropy")).loss_fn_outputs[0]["logprobs"].tolist()
    assert after[0] is None
    assert after[1:] == pytest.approx(trained, abs=1e-5)
    with torch.no_grad(), applied(None):
        base = backend.base.model(input_ids=torch.tensor([[1, 2, 3, 4]])).logits[0, :-1].log_softmax(-1)
    assert before[1:] == pytest.approx(base[range(3), [2, 3, 4]].tolist(), abs=1e-5)  # B is zero in version 0
