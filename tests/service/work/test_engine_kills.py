"""An engine killed with -9 at random moments, again and again: each operation runs once, and not a bit is off."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import engine_kill_program
import pytest
from computed import computed
from engine_kill_program import PROMPT, STEPS, script
from engine_operations import decode
from random_datums import byte_datums
from safetensors.torch import load_file
from samples import assert_same_samples
from tiny import save_byte_model

from nat_plugin_evsys import ServiceClient, types
from nat_plugin_evsys.service.store.operations import Operation, Outcome
from nat_plugin_evsys.service.store.store import Store
from nat_plugin_evsys.service.wire.kinds import OperationKind

LIVES = 8


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_byte_model(tmp_path_factory.mktemp("kills") / "tiny"))


@pytest.fixture(scope="module")
def stores(base: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two stores after the same script: of one server's life, and of many that were killed."""
    root = tmp_path_factory.mktemp("kills") / "stores"
    command = [sys.executable, engine_kill_program.__file__, base, str(root), str(LIVES)]
    path = os.pathsep.join((str(Path(engine_kill_program.__file__).parent), os.environ.get("PYTHONPATH", "")))
    env = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=env)
    assert done.returncode == 0, done.stderr
    ended = json.loads(done.stdout.splitlines()[-1])
    in_the_middle = {count for count in ended if 0 < count < len(script(base))}
    assert len(in_the_middle) >= LIVES / 2, f"the kills must have hit different places, but {ended} had ended"
    return {"whole": root / "whole", "killed": root / "killed"}


def outcomes(root: Path, base: str) -> list[tuple[Operation, Outcome]]:
    store = Store(root / "store")
    try:
        assert store.unfinished() == []
        found = [(operation, store.outcome(operation.request_id)) for operation in script(base)]
        return [(operation, stored.outcome) for operation, stored in found]  # type: ignore[union-attr, misc]
    finally:
        store.close()


def test_every_outcome_is_told_at_most_once_and_never_changes(stores: dict[str, Path], base: str) -> None:
    told = [line.split() for line in (stores["killed"] / "told").read_text().splitlines()]
    assert max(Counter(request_id for request_id, _ in told).values()) == 1
    bodies = {operation.request_id: outcome.body for operation, outcome in outcomes(stores["killed"], base)}
    assert len(told) > len(bodies) - LIVES * 8
    for request_id, digest in told:
        assert hashlib.sha256(bodies[request_id]).hexdigest() == digest


def test_every_outcome_is_that_of_the_uninterrupted_run(stores: dict[str, Path], base: str) -> None:
    whole, killed = outcomes(stores["whole"], base), outcomes(stores["killed"], base)
    failed = [operation.seq_id for operation, outcome in killed if outcome.failed]
    assert failed == [14, 15], "the bad Datum and the step after it"
    for (operation, one), (_, other) in zip(whole, killed, strict=True):
        if operation.scope.endswith(":train:0"):
            continue  # its LoRA seed was drawn anew
        assert one.effect == other.effect
        first, second = decode(operation, one), decode(operation, other)
        if operation.kind == OperationKind.SAMPLE:
            asked = json.loads(operation.payload)["sampling_params"]
            assert_same_samples(first.sequences, second.sequences, PROMPT, types.SamplingParams(**asked))
        elif operation.kind == OperationKind.FORWARD_BACKWARD and not one.failed:
            assert computed(first.metrics) == computed(second.metrics)
            assert [_lists(each) for each in first.loss_fn_outputs] == [_lists(e) for e in second.loss_fn_outputs]
        else:
            assert first == second


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("name", ["whole", "killed"])
def test_weights_and_moments_are_those_of_an_in_process_run(
    stores: dict[str, Path], base: str, tmp_path: Path, name: str, number: int
) -> None:
    store = Store(stores[name] / "store")
    (row,) = (each for each in store.models() if each.model_seq_id == number)
    store.close()
    assert row.lora_seed == 7 if number else row.lora_seed is not None
    with ServiceClient(store=tmp_path / "reference", device="cpu") as service:
        client = service.create_lora_training_client(base, rank=4, seed=row.lora_seed).result()
        for step in range(STEPS):
            # The step whose gradient was incomplete was refused.
            if not (number and step == 3):
                for chunk in range(2):
                    client.forward_backward(byte_datums(100 * step + chunk, length=30), "cross_entropy")
                client.optim_step(types.AdamParams(learning_rate=1e-2 / (1 + step), grad_clip_norm=1.0)).result()
            if number and step % 4 == 1:
                path = client.save_state(f"step-{step}").result().path
            if number and step % 4 == 3:
                load = client.load_state_with_optimizer if step % 8 == 3 else client.load_state
                load(path).result()
        expected = client.save_state("end").result().path
    mine = stores[name] / "store" / "checkpoints" / row.model_id / "weights" / "end"
    theirs = tmp_path / "reference" / expected.removeprefix("tinker://")
    for file in ("adapter_model.safetensors", "optimizer.safetensors"):
        one, other = load_file(mine / file), load_file(theirs / file)
        assert len(one) >= 28
        assert {n: t.numpy().tobytes() for n, t in one.items()} == {n: t.numpy().tobytes() for n, t in other.items()}


def _lists(output: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor.tolist() for name, tensor in output.items()}
