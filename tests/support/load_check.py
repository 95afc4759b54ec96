"""Many clients, killed at random, on one server; then everything that happened is checked and done again.

    python tests/support/load_check.py [--clients 8] [--operations 500] [--kills 3] [--seed 0]

Checked, for every model: the server's log is what its client sent, in order, nothing lost or twice; each answer that a
client got is the one in the log; and a fresh engine that runs the log arrives at the server's weights and moments, bit
for bit. The server's memory is watched meanwhile. Prints a JSON summary; the exit code is 1 when something is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from load_client import Journal
from safetensors.torch import load_file
from serve_process import start_server
from tinker import types
from tiny import save_byte_model

from nat_plugin_evsys.engine.checkpoint_loading import load_checkpoint
from nat_plugin_evsys.engine.checkpoints import save_checkpoint
from nat_plugin_evsys.engine.gradient.trainable import TrainableModel
from nat_plugin_evsys.runtime.bases import BaseModels
from nat_plugin_evsys.runtime.checkpoint_store import CheckpointStore
from nat_plugin_evsys.service.proto import tinker_wire_pb2 as wire_pb2
from nat_plugin_evsys.service.store.operations import Effect, Operation, Outcome
from nat_plugin_evsys.service.store.store import ModelRow, Store
from nat_plugin_evsys.service.wire.forward_backward import decode_forward_backward
from nat_plugin_evsys.service.wire.kinds import OperationKind

KEY = "tml-load-check-0123456789"


def drive(url: str, base_model: Path, journals: list[Path], operations: int, kills: int, seed: int) -> int:
    """Run the clients, each killed ``kills`` times at random; returns how many kills hit a running client."""
    hits = [0] * len(journals)

    def keep_running(index: int) -> None:
        rng = random.Random(f"{seed}/{index}")
        command = [sys.executable, str(Path(__file__).with_name("load_client.py")), url, KEY, str(base_model)]
        command += [str(journals[index]), str(operations), str(seed + index)]
        for kill in range(kills + 1):
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            if kill < kills:
                goal = operations * (kill + rng.random()) / kills
                while process.poll() is None and _sent(journals[index]) < goal:
                    time.sleep(rng.uniform(0.05, 0.3))
                if process.poll() is None:
                    process.kill()
                    hits[index] += 1
            if process.wait() not in (0, -9):
                raise RuntimeError(f"client {index} ended with code {process.returncode}")

    failures: list[BaseException] = []

    def guarded(index: int) -> None:
        try:
            keep_running(index)
        except BaseException as error:  # noqa: BLE001 - carried to the main thread
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(index,)) for index in range(len(journals))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return sum(hits)


def _sent(journal: Path) -> int:
    return journal.read_text().count('"send"') if journal.exists() else 0


class MemoryWatch:
    """Resident memory of a process, in MB, once in a while."""

    def __init__(self, process: psutil.Process, every: float = 0.5) -> None:
        self.readings: list[float] = []
        self._process, self._every, self._stop = process, every, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> dict[str, float]:
        """Growth over the last half: median of its last fifth over that of its first fifth; and the extremes."""
        self._stop.set()
        self._thread.join()
        half = self.readings[len(self.readings) // 2 :]
        fifth = max(1, len(half) // 5)
        growth = statistics.median(half[-fifth:]) / statistics.median(half[:fifth]) - 1
        return {"growth": round(growth, 4), "least_mb": round(min(half), 1), "most_mb": round(max(half), 1)}

    def _watch(self) -> None:
        while not self._stop.wait(self._every):
            self.readings.append(self._process.memory_info().rss / 2**20)


def check_journals(store: Store, journals: list[Path]) -> tuple[dict[str, int], list[str]]:
    """Compare what clients sent and got with the server's log."""
    counts = {"sent": 0, "acknowledged": 0, "in_log": 0, "models": len(store.models())}
    wrong: list[str] = []
    for path in journals:
        lines = Journal(path).lines
        by_model: dict[str, list[dict[str, Any]]] = {}
        done = {(line["model"], line["n"]): line for line in lines if line["event"] == "done"}
        for line in lines:
            if line["event"] == "send":
                by_model.setdefault(line["model"], []).append(line)
        counts["sent"] += sum(map(len, by_model.values()))
        counts["acknowledged"] += len(done)
        for model_id, sends in by_model.items():
            log = store.log(model_id)
            counts["in_log"] += len(log)
            wrong += _compare(model_id, [s for s in sends if s["kind"] != "sample"], log, done)
    return counts, wrong


def _compare(model_id: str, sends: list[dict[str, Any]], log: list[tuple[Operation, Outcome]], done: Any) -> list[str]:
    numbers = [operation.seq_id for operation, _ in log]
    if numbers != list(range(len(numbers))):
        return [f"{model_id}: the log's sequence numbers are not 0, 1, 2, …: {numbers}"]
    ran = log[1:]  # the first made the model
    # A killed client may have noted an operation, or four, that never left it.
    if len(ran) > len(sends):
        return [f"{model_id}: {len(ran)} operations in the log, {len(sends)} sent"]
    wrong = []
    for index, line in enumerate(sends):
        answer = done.get((model_id, line["n"]))
        if index >= len(ran):
            if answer is not None:
                wrong.append(f"{model_id}: operation {line['n']} was answered and is not in the log")
            continue
        operation, outcome = ran[index]
        kind = "forward_backward" if line["kind"] == "forward" else line["kind"]
        if operation.kind != kind:
            wrong.append(f"{model_id}: {line['kind']} was sent as operation {index + 1}, the log has {operation.kind}")
        elif outcome.failed:
            wrong.append(f"{model_id}: operation {index + 1} ({operation.kind}) failed: {outcome.body!r}")
        elif answer and "loss" in answer and answer["loss"] != _loss(outcome):
            wrong.append(f"{model_id}: operation {index + 1} answered {answer['loss']}, the log has {_loss(outcome)}")
    return wrong


def _loss(outcome: Outcome) -> float:
    output = wire_pb2.ForwardBackwardOutput()
    output.ParseFromString(outcome.body)
    loss: float = output.metrics["loss:sum"]
    return loss


def replay(store: Store, root: Path, base_model: Path, row: ModelRow, scratch: Path) -> str | None:
    """Run a model's log on a fresh engine and compare it with the server's last state; None when they are equal."""
    bases = BaseModels(max_batch_size=8, device="cpu", dtype="float32")
    model: TrainableModel | None = None
    log = store.log(row.model_id)
    for operation, outcome in log:
        if row.saved_state is not None and operation.seq_id > row.saved_state_seq:
            break
        if operation.seq_id == 0:
            model = _first(bases, CheckpointStore(root / "checkpoints"), str(base_model), row, operation)
            continue
        assert model is not None
        loss = _run(model, operation, outcome)
        if loss is not None and loss != _loss(outcome):
            return f"{row.model_id}: operation {operation.seq_id} gave {_loss(outcome)}, again {loss}"
    assert model is not None
    if row.saved_state is None:  # nothing to write down before the first optimizer step
        stepped = any(operation.kind is OperationKind.OPTIM_STEP for operation, _ in log)
        return f"{row.model_id}: the server left no state" if stepped else None
    mine = save_checkpoint(scratch, row.model_id.replace(":", "_"), model, kind="training")
    theirs = root / "states" / row.model_id / row.saved_state
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        a, b = load_file(mine / name), load_file(theirs / name)
        if a.keys() != b.keys() or not all(torch.equal(a[key], b[key]) for key in a):
            return f"{row.model_id}: {name} differs after operation {row.saved_state_seq}"
    return None


def _first(
    bases: BaseModels, checkpoints: CheckpointStore, base_model: str, row: ModelRow, operation: Operation
) -> TrainableModel:
    shared = bases.get(base_model)
    flags = {"train_attn": row.train_attn, "train_mlp": row.train_mlp, "train_unembed": row.train_unembed}
    model = shared.fresh(rank=row.lora_rank, seed=row.lora_seed, **flags)
    if operation.kind is OperationKind.LOAD_WEIGHTS:
        body = json.loads(operation.payload)
        load_checkpoint(checkpoints.resolve(body["path"]), model, with_optimizer=body["optimizer"])
    return model


def _run(model: TrainableModel, operation: Operation, outcome: Outcome) -> float | None:
    if operation.kind is OperationKind.FORWARD_BACKWARD:
        request = decode_forward_backward(operation.payload)
        run = model.forward if request.forward_only else model.forward_backward
        return run(request.data, request.loss_fn, request.loss_fn_config).metrics["loss:sum"]
    if operation.kind is OperationKind.OPTIM_STEP:
        if outcome.effect is Effect.CLEARED:
            model.discard_gradient()
        else:
            model.optim_step(types.AdamParams(**json.loads(operation.payload)["adam_params"]))
    return None


def check(clients: int, operations: int, kills: int, seed: int, root: Path) -> dict[str, Any]:
    """All of it; what is wrong is in ``wrong``."""
    # As the server and the clients: the order of sums depends on it.
    torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))
    base_model = save_byte_model(root / "model")
    journals = [root / f"client{index}.jsonl" for index in range(clients)]
    started = time.monotonic()
    server = start_server(base_model, root / "store", "--api-key", KEY, "--retain-operations")
    try:
        watch = MemoryWatch(psutil.Process(server.process.pid))
        hits = drive(server.url, base_model, journals, operations, kills, seed)
        seconds = time.monotonic() - started
        memory = watch.stop()
        if server.stop(timeout=120) != 0:
            raise RuntimeError(f"the server did not end well: {server.log.read_text()[-3000:]}")
    finally:
        server.kill()
    store = Store(root / "store")
    try:
        counts, wrong = check_journals(store, journals)
        replays = [replay(store, root / "store", base_model, row, root / "replayed") for row in store.models()]
    finally:
        store.close()
    wrong += [each for each in replays if each]
    equal = sum(each is None for each in replays)
    return {**counts, "kills": hits, "replayed_equal": equal, "seconds": seconds, "memory": memory, "wrong": wrong[:20]}


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--operations", type=int, default=500, help="of each client")
    parser.add_argument("--kills", type=int, default=3, help="of each client")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        summary = check(given.clients, given.operations, given.kills, given.seed, Path(root))
    print(json.dumps(summary, indent=2))
    return 1 if summary["wrong"] or summary["memory"]["growth"] > 0.05 else 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
    sys.exit(main())
