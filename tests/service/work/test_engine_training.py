"""The engine of the server against the in-process clients: order, chunks, failures, checkpoints, turns."""

from __future__ import annotations

import itertools
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from computed import computed
from engine_operations import SESSION, EngineHarness, ModelOperations
from random_datums import byte_datums
from safetensors.torch import load_file
from sqlalchemy.exc import OperationalError
from tiny import save_byte_model

from nat_plugin_evsys import ServiceClient, types
from nat_plugin_evsys.errors import StoreError
from nat_plugin_evsys.service.store.operations import JSON, Operation, Outcome
from nat_plugin_evsys.service.store.store import SessionRow, Store
from nat_plugin_evsys.service.wire.kinds import OperationKind
from nat_plugin_evsys.service.work import ending
from nat_plugin_evsys.service.work.states import SavedStates, StatePolicy

STEPS = 3


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_byte_model(tmp_path_factory.mktemp("engine") / "tiny"))


@pytest.fixture
def harness(tmp_path: Path, base: str) -> Iterator[EngineHarness]:
    with EngineHarness(tmp_path / "store", [base], gap_timeout=0.5) as made:
        yield made


@pytest.fixture
def in_process(tmp_path: Path, base: str) -> Iterator[Callable[..., Any]]:
    """``in_process(**lora)``: a TrainingClient over the engine in this process."""
    with ServiceClient(store=tmp_path / "reference", device="cpu") as service:
        yield lambda **lora: service.create_lora_training_client(base, **{"rank": 4, "seed": 0, **lora}).result()


def saved(directory: Path) -> dict[str, bytes]:
    """The tensors of a training checkpoint, exactly."""
    files = ("adapter_model.safetensors", "optimizer.safetensors")
    return {n: t.numpy().tobytes() for file in files for n, t in load_file(directory / file).items()}


def steps(model: ModelOperations, count: int = STEPS, chunks: int = 2) -> list[Operation]:
    made = []
    for step in range(count):
        made += [model.forward_backward(byte_datums(10 * step + chunk)) for chunk in range(chunks)]
        made.append(model.optim_step(1e-2 / (1 + step), grad_clip_norm=1.0))
    return made


def test_same_weights_and_results_as_in_process(
    harness: EngineHarness, base: str, in_process: Callable[..., Any], tmp_path: Path
) -> None:
    model, client = ModelOperations(), in_process()
    assert harness.run(model.create(base)) == [{"type": "create_model", "model_id": model.model_id}]
    for operation in steps(model):
        (result,) = harness.run(operation)
        if operation.kind == OperationKind.OPTIM_STEP:
            step = int(result["metrics"]["step"])
            params = types.AdamParams(learning_rate=1e-2 / step, grad_clip_norm=1.0)
            assert result["metrics"] == client.optim_step(params).result().metrics
        else:
            step, chunk = divmod(operation.seq_id - 1, 3)
            expected = client.forward_backward(byte_datums(10 * step + chunk), "cross_entropy").result()
            assert computed(result.metrics) == computed(expected.metrics)
            assert all(name.count(":") == 1 for name in result.metrics)
            assert "loss:sum" in result.metrics
            for mine, theirs in zip(result.loss_fn_outputs, expected.loss_fn_outputs, strict=True):
                assert mine["logprobs"].tolist() == theirs["logprobs"].tolist()
    (answer,) = harness.run(model.save("end", user_metadata={"a": "b"}))
    assert answer == {"path": f"tinker://{model.model_id}/weights/end", "type": "save_weights"}
    mine = saved(harness.checkpoints.resolve(answer["path"]))
    reference = client.save_state("end").result().path
    theirs = saved(tmp_path / "reference" / reference.removeprefix("tinker://"))
    assert len(mine) > 10
    assert mine == theirs


def test_any_order_of_arrival(tmp_path: Path, base: str) -> None:
    made = []
    for shuffle in (None, 1, 2):
        with EngineHarness(tmp_path / f"store-{shuffle}", [base]) as harness:
            model = ModelOperations()
            harness.run(model.create(base))
            operations = steps(model)
            if shuffle is not None:
                random.Random(shuffle).shuffle(operations)
            ids = [request_id for each in operations for request_id in harness.put(each)]
            assert not any(outcome.failed for outcome in harness.wait(*ids))
            wait_until(lambda: len(harness.finished) == 1 + len(operations))  # noqa: B023
            assert harness.finished[1:] == [f"{model.model_id}/{seq}" for seq in range(1, len(operations) + 1)]
            made.append(harness.weights(model.model_id))
    assert made[0] == made[1] == made[2]


def test_a_repeated_request_runs_once(harness: EngineHarness, base: str) -> None:
    model = ModelOperations()
    harness.run(model.create(base))
    first = model.forward_backward(byte_datums(0))
    again = Operation("another-id", first.owner, first.kind, first.scope, first.seq_id, first.payload)
    ids = harness.put(first, again, first)
    assert ids == [first.request_id] * 3
    harness.wait(*ids)
    once = {k: v.clone() for k, v in harness.hosted(model.model_id).model.gradient.items()}  # type: ignore[union-attr]
    other = ModelOperations(1)
    harness.run(other.create(base), other.forward_backward(byte_datums(0)))
    gradient = harness.hosted(other.model_id).model.gradient  # type: ignore[union-attr]
    assert all(torch.equal(once[name], gradient[name]) for name in gradient)
    assert harness.finished.count(first.request_id) == 1


def test_a_pipelined_step_is_refused_after_a_failed_chunk(harness: EngineHarness, base: str) -> None:
    model = ModelOperations()
    harness.run(model.create(base))
    good, bad = byte_datums(0), [types.Datum(types.ModelInput.from_ints([1, 999]), {"target_tokens": [1, 2]})]
    results = harness.run(model.forward_backward(good), model.forward_backward(bad), model.optim_step())
    assert results[1]["category"] == "user"
    assert "999" in results[1]["error"]
    assert results[2]["category"] == "user"
    assert "the gradient is incomplete: forward_backward 2 failed" in results[2]["error"]
    # The refused step threw the gradient away: there is nothing to step with, and the next one is whole.
    (empty,) = harness.run(model.optim_step())
    assert "no gradient has accumulated" in empty["error"]
    results = harness.run(model.forward_backward(byte_datums(1)), model.optim_step())
    assert results[1]["metrics"]["step"] == 1.0


def test_a_step_sent_after_the_failure_uses_what_accumulated(
    harness: EngineHarness, base: str, in_process: Callable[..., Any], tmp_path: Path
) -> None:
    model, client = ModelOperations(), in_process()
    bad = [types.Datum(types.ModelInput.from_ints([1, 999]), {"target_tokens": [1, 2]})]
    harness.run(model.create(base), model.forward_backward(byte_datums(0)), model.forward_backward(bad))
    forward_only = harness.run(model.forward_backward(bad, forward_only=True))
    assert forward_only[0]["category"] == "user"
    (result,) = harness.run(model.optim_step())
    client.forward_backward(byte_datums(0), "cross_entropy").result()
    expected = client.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    assert result["metrics"] == expected.metrics


def test_a_failure_is_remembered_over_a_restart(tmp_path: Path, base: str) -> None:
    model = ModelOperations()
    bad = [types.Datum(types.ModelInput.from_ints([1, 999]), {"target_tokens": [1, 2]})]
    with EngineHarness(tmp_path / "store", [base]) as harness:
        harness.run(model.create(base))
        pipelined = [model.forward_backward(byte_datums(0)), model.forward_backward(bad), model.optim_step()]
        harness.run(*pipelined[:2])
        harness.store.add_operation(pipelined[2]).result()  # arrived, not run
    with EngineHarness(tmp_path / "store", [base]) as harness:
        (outcome,) = harness.wait(pipelined[2].request_id)
        assert b"the gradient is incomplete: forward_backward 2 failed" in outcome.body
        (result,) = harness.run(model.optim_step())
        assert "no gradient has accumulated" in result["error"]


def test_a_gap_that_does_not_close_is_given_up(harness: EngineHarness, base: str) -> None:
    model = ModelOperations()
    harness.run(model.create(base))
    missing = model.forward_backward(byte_datums(0))
    started = time.monotonic()
    results = harness.run(model.forward_backward(byte_datums(1)), model.optim_step())
    assert 0.5 <= time.monotonic() - started < 10
    assert all("operation 1 of model" in result["error"] for result in results)
    (late,) = harness.run(missing)
    assert "came too late" in late["error"]
    results = harness.run(model.forward_backward(byte_datums(2)), model.optim_step())
    assert results[1]["metrics"]["step"] == 1.0


def test_bad_requests_fail_by_name_and_the_thread_goes_on(harness: EngineHarness, base: str) -> None:
    model = ModelOperations()
    cases = [
        (model.create("no/such/model"), "is not served here"),
        (ModelOperations(1).operation(OperationKind.CREATE_MODEL, b"{", 0), "the request is malformed"),
        (ModelOperations(2).create(base, rank=0), "lora_config.rank is 0: finetuning all weights is not"),
        (ModelOperations(3).create(base, train_attn=False, train_mlp=False, train_unembed=False), "nothing to train"),
        (ModelOperations(4).optim_step(), "there is no model"),
    ]
    for operation, message in cases:
        (result,) = harness.run(operation)
        assert message in result["error"]
        assert result["category"] == "user"
    good = ModelOperations(5)
    harness.run(good.create(base))
    kinds, data = OperationKind, byte_datums(0)
    cases = [
        (good.forward_backward([]), "data is an empty list"),
        (good.forward_backward(data, "custom"), "'custom' is not offered"),
        (good.forward_backward(data, "stable_reinforce"), "is not public"),
        (good.forward_backward(data, "nonsense"), "nonsense"),
        (good.operation(kinds.FORWARD_BACKWARD, b"\xff\xff"), ""),
        (good.optim_step(), ""),  # clears what the failures before left incomplete, or has no gradient
        (good.operation(kinds.OPTIM_STEP, {"optimizer_params": {"type": "dimuon", "learning_rate": 1}}), "'dimuon' is"),
        (good.operation(kinds.OPTIM_STEP, {"adam_params": {"learning_rate": -1}}), "learning_rate is -1"),
        (good.save("../x"), "is refused"),
        (good.save("x", ttl_seconds=5), "ttl_seconds"),
        (good.save("x", kinds.SAVE_WEIGHTS_EXTERNAL, age_encryption_recipients=["age1x"]), "age_encryption_recipients"),
        (
            good.operation(kinds.SAVE_WEIGHTS_FOR_SAMPLER, {"path": "x", "kind": "inflight"}),
            "inflight weights have no name",
        ),
        (good.operation(kinds.SAVE_WEIGHTS_FOR_SAMPLER, {"kind": "live"}), "'snapshot' or 'inflight', got 'live'"),
        (good.operation(kinds.SAVE_WEIGHTS_FOR_SAMPLER, {}), "sampling_session_seq_id"),
        (good.load("/etc", optimizer=False), "is malformed"),
        (good.load(f"tinker://{good.model_id}/weights/..", optimizer=False), "is refused"),
        (good.load(f"tinker://{good.model_id}/weights/none", optimizer=False), "does not exist"),
    ]
    for operation, message in cases:
        (result,) = harness.run(operation)
        assert message in result["error"], operation
        assert result["category"] == "user"
        assert str(harness.store.root) not in result["error"]
    results = harness.run(good.forward_backward(data), good.optim_step())
    assert results[1]["metrics"]["step"] == 1.0


def test_a_store_that_cannot_write_is_not_the_user_s_fault(
    harness: EngineHarness, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(_: Any) -> Future[None]:
        failed: Future[None] = Future()
        failed.set_exception(StoreError("the disk is full"))
        return failed

    monkeypatch.setattr(harness.store, "add_model", full_disk)
    (result,) = harness.run(ModelOperations().create(base))
    assert result == {"error": "the disk is full", "category": "server"}


def test_an_outcome_waits_for_a_store_that_can_neither_be_written_nor_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "store")
    operation = ModelOperations().optim_step()
    store.add_operation(operation).result()
    whole, reads = store._reader, []

    class Failing:
        def connect(self) -> Any:
            reads.append(1)
            monkeypatch.undo()
            store._reader = whole
            raise OperationalError("", None, OSError("the disk is gone"))

    def refused(*_: Any, **__: Any) -> Future[None]:
        failed: Future[None] = Future()
        failed.set_exception(StoreError("the disk is gone"))
        return failed

    monkeypatch.setattr(ending, "_RETRY_S", 0.01)
    monkeypatch.setattr(store, "finish_operation", refused)
    store._reader = Failing()  # type: ignore[assignment]
    assert ending.end(store, operation, Outcome(b"{}", JSON), threading.Event())
    assert reads == [1]
    assert store.unfinished() == []
    store.close()


def test_a_fault_in_a_step_does_not_leave_half_a_step(
    harness: EngineHarness, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ModelOperations()
    harness.run(model.create(base), *steps(model, 1))
    before = harness.weights(model.model_id)
    hosted = harness.hosted(model.model_id)
    assert hosted.model is not None

    def half_a_step(*_: Any) -> None:
        with torch.no_grad():
            next(iter(hosted.model.parameters.values())).add_(1.0)  # type: ignore[union-attr]
        raise RuntimeError("out of memory, say")

    monkeypatch.setattr(hosted.model.optimizer, "step", half_a_step)
    results = harness.run(model.forward_backward(byte_datums(5)), model.optim_step())
    assert results[1]["category"] == "server"
    assert harness.weights(model.model_id) == before


def fail_to_save_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every state be due, and none be saved, for a reason that nobody foresaw."""

    def write(*_: Any) -> tuple[str, float]:
        raise MemoryError("no room for the state")

    monkeypatch.setattr(StatePolicy, "due", lambda *_: True)
    monkeypatch.setattr(SavedStates, "write", write)


def test_a_fault_after_an_outcome_is_stored_does_not_run_the_operation_again(
    harness: EngineHarness, base: str, in_process: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_to_save_states(monkeypatch)
    model, client = ModelOperations(), in_process()
    harness.run(model.create(base))
    for number in range(2):
        results = harness.run(model.forward_backward(byte_datums(number)), model.optim_step())
        client.forward_backward(byte_datums(number), "cross_entropy").result()
        expected = client.optim_step(types.AdamParams(learning_rate=1e-2)).result()
        assert results[1]["metrics"] == expected.metrics
    monkeypatch.undo()  # the model can be parked again


def test_a_fault_while_operations_are_given_up_leaves_none_without_an_outcome(
    harness: EngineHarness, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ModelOperations()
    harness.run(model.create(base), *steps(model, 1))
    fail_to_save_states(monkeypatch)
    model.forward_backward(byte_datums(1))  # never sent
    results = harness.run(model.forward_backward(byte_datums(2)), model.optim_step())
    assert all("has not arrived within 0.5 s" in result["error"] for result in results)
    monkeypatch.undo()


def test_checkpoints_load_into_old_and_new_models(harness: EngineHarness, base: str) -> None:
    model = ModelOperations()
    harness.run(model.create(base, seed=None), *steps(model))
    after = harness.weights(model.model_id)
    external, training, sampler = (
        harness.run(model.save("a", kind))[0]["path"]
        for kind in (
            OperationKind.SAVE_WEIGHTS_EXTERNAL,
            OperationKind.SAVE_WEIGHTS,
            OperationKind.SAVE_WEIGHTS_FOR_SAMPLER,
        )
    )
    assert external == f"tinker://{model.model_id}/external_weights/a"
    assert {c.checkpoint_type for c in harness.checkpoints.checkpoints(model.model_id)} == {
        "training",
        "sampler",
        "external",
    }
    (taken,) = harness.run(model.save("a"))
    assert "exists" in taken["error"]
    harness.run(*steps(model, 1))
    assert harness.weights(model.model_id) != after
    (loaded,) = harness.run(model.load(training, optimizer=True))
    assert loaded == {"path": training, "model_id": model.model_id, "type": "load_weights"}
    assert harness.weights(model.model_id) == after
    new = ModelOperations(1)
    (made,) = harness.run(new.create_from(training, optimizer=True))
    assert made == {"path": training, "model_id": new.model_id, "type": "load_weights"}
    assert harness.weights(new.model_id) == after
    bare = ModelOperations(2)
    harness.run(bare.create_from(sampler, optimizer=False))
    assert {n: v for n, v in after.items() if "lora" in n and "exp" not in n and "step" not in n} == harness.weights(
        bare.model_id
    )
    (refused,) = harness.run(ModelOperations(3).create_from(sampler, optimizer=True))
    assert "saved for sampling" in refused["error"]


def test_another_owners_checkpoint_is_like_none(harness: EngineHarness, base: str) -> None:
    mine, session = ModelOperations(), SESSION.replace("0000-4000", "0001-4000")
    harness.store.add_session(SessionRow(session, "other")).result()
    harness.run(mine.create(base))
    (path,) = (each["path"] for each in harness.run(mine.save("a")))
    theirs = ModelOperations(0, "other", session)
    harness.run(theirs.create(base))
    foreign, missing = harness.run(theirs.load(path, optimizer=False), theirs.load(path + "b", optimizer=False))
    assert foreign["error"].replace(path, "P") == missing["error"].replace(path + "b", "P")
    harness.store.publish(path, "local").result()
    (loaded,) = harness.run(theirs.load(path, optimizer=False))
    assert loaded["path"] == path
    harness.run(mine.save("a", overwrite=True))  # a new one, which nobody has published
    (refused,) = harness.run(theirs.load(path, optimizer=False))
    assert "error" in refused


def test_parked_and_returned_is_bit_equal(tmp_path: Path, base: str) -> None:
    ends = []
    for park in (False, True):
        with EngineHarness(tmp_path / f"store-{park}", [base]) as harness:
            model = ModelOperations()
            harness.run(model.create(base))
            for operation in steps(model):  # parks with and without a pending gradient
                if park:
                    harness.engine.park_session(SESSION)
                    wait_until(lambda: harness.engine.status()["models"][model.model_id]["state"] == "parked")  # noqa: B023
                assert "error" not in str(harness.run(operation)[0])[:20]
            ends.append(harness.weights(model.model_id))
    assert ends[0] == ends[1]


def test_more_models_than_memory_holds_are_bit_equal(tmp_path: Path, base: str) -> None:
    """However small the memory, every model goes on from where it was, and only the last one stays."""
    ends = []
    for options in ({}, {"model_bytes": 1}):
        with EngineHarness(tmp_path / f"store-{len(options)}", [base], **options) as harness:
            models = [ModelOperations(number) for number in range(4)]
            for operations in zip(*([each.create(base), *steps(each)] for each in models), strict=True):
                results = harness.run(*operations)  # parks with and without a pending gradient
                assert "error" not in str(results)
            wait_until(lambda: loaded(harness) == (1 if options else 4))  # noqa: B023
            ends.append([harness.weights(each.model_id) for each in models])
    assert ends[0] == ends[1]


def test_the_models_that_ran_longest_ago_leave_memory(tmp_path: Path, base: str) -> None:
    models = [ModelOperations(number) for number in range(10)]
    with EngineHarness(tmp_path / "measured", [base]) as harness:
        harness.run(models[0].create(base))
        hosted = harness.hosted(models[0].model_id)
        wait_until(lambda: hosted.held_bytes > 0)  # it is measured after the operation's result is known
        held = hosted.held_bytes
    with EngineHarness(tmp_path / "store", [base], model_bytes=3 * held) as harness:
        for each in models:
            harness.run(each.create(base))
        harness.run(models[0].save("a"))  # comes back: nothing was trained, so it is made again from its seed
        wait_until(lambda: loaded(harness) == 3)
        states = harness.engine.status()["models"]
        assert [n for n, each in enumerate(models) if states[each.model_id]["state"] == "loaded"] == [0, 8, 9]


def loaded(harness: EngineHarness) -> int:
    """How many models are in memory."""
    return sum(each["state"] == "loaded" for each in harness.engine.status()["models"].values())


def test_a_model_loaded_from_a_deleted_checkpoint_comes_back(tmp_path: Path, base: str) -> None:
    model, other = ModelOperations(), ModelOperations(1)
    with EngineHarness(tmp_path / "store", [base]) as harness:
        harness.run(model.create(base), *steps(model))
        (path,) = (each["path"] for each in harness.run(model.save("a")))
        harness.run(other.create_from(path, optimizer=True), model.load(path, optimizer=True))
        harness.checkpoints.delete(path)
        harness.run(*steps(model, 1), *steps(other, 1))
        before = harness.weights(model.model_id), harness.weights(other.model_id)
    with EngineHarness(tmp_path / "store", [base]) as harness:
        harness.run(model.forward_backward(byte_datums(0)), other.forward_backward(byte_datums(0)))
        assert (harness.weights(model.model_id), harness.weights(other.model_id)) == before


def test_models_take_turns(harness: EngineHarness, base: str) -> None:
    greedy, modest = ModelOperations(0), ModelOperations(1)
    harness.run(greedy.create(base), modest.create(base))
    many = [greedy.forward_backward(byte_datums(i, count=4, length=40)) for i in range(40)]
    few = [modest.forward_backward(byte_datums(i, count=4, length=40)) for i in range(8)]
    harness.finished.clear()
    ids = harness.put(*many) + harness.put(*few)
    harness.wait(*ids)
    places = [i for i, request_id in enumerate(harness.finished) if request_id.startswith(modest.model_id)]
    first = places[0]
    assert first < 40, "the modest model must not wait for all of the greedy one's operations"
    # From its first turn on it gets every other one, or nearly. Turns are shared out by their time: one that is
    # interrupted for long is followed by several of the other model.
    between = [b - a for a, b in itertools.pairwise(places)]
    assert statistics.median(between) <= 3, harness.finished
    status = harness.engine.status()
    assert status["models"][greedy.model_id]["tokens_trained"] == 40 * 4 * 39
    assert status["tokens"]["trained"] == 48 * 4 * 39


def test_a_forgotten_session_frees_everything(harness: EngineHarness, base: str) -> None:
    model = ModelOperations()
    harness.run(model.create(base), *steps(model), model.save_ephemeral(1))
    (path,) = (each["path"] for each in harness.run(model.save("a")))
    harness.engine.park_session(SESSION)
    states, samplers = harness.store.root / "states", harness.store.root / "samplers"
    wait_until(lambda: states.is_dir() and any(not each.name.startswith(".") for each in states.glob("*/*")))
    assert len(list(samplers.iterdir())) == 1
    harness.engine.forget_session(SESSION)
    harness.store.forget_session(SESSION).result()
    assert not list(states.iterdir())
    assert not list(samplers.iterdir())
    assert harness.engine.status()["models"] == {}
    assert harness.checkpoints.resolve(path).is_dir()


def test_describe(harness: EngineHarness, base: str) -> None:
    model = ModelOperations()
    harness.run(model.create(base))
    facts = types.GetInfoResponse.model_validate(harness.engine.describe(model.model_id))
    assert (facts.model_id, facts.lora_rank, facts.is_lora) == (model.model_id, 4, True)
    assert facts.model_data.tokenizer_id == base


def wait_until(condition: Callable[[], bool], timeout: float = 20.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.005)
