"""Kills replicas with SIGKILL at random moments of a run on a Ray cluster, and compares with a run without kills.

    make test-ray-kills [ARGS="--small"]

400 operations (forward_backward and optim_step in turns, and a sample after every tenth step) on builtin/tiny with two
replicas. While they run, 50 kills hit one replica each, at random moments: it computes, samples, waits, or is being
started again. Passes if every result, every sample and the final weights are those of the run without kills, bit for
bit.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import ray
import torch
from tinker import types

from nat_plugin_evsys.backends.ray import RayBackend
from nat_plugin_evsys.config.ray import RayConfig

MODEL = "builtin/tiny"
PROMPT = types.ModelInput.from_ints(list(range(5, 60)))


def main() -> int:
    """Run both and print what was seen."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--operations", type=int, default=400)
    arguments.add_argument("--kills", type=int, default=50)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--small", action="store_true", help="40 operations, 5 kills")
    options = arguments.parse_args()
    if options.small:
        options.operations, options.kills = 40, 5
    ray.init(num_cpus=2, object_store_memory=80 << 20, include_dashboard=False, log_to_driver=False)
    try:
        summary = asyncio.run(_both(options.operations, options.kills, random.Random(options.seed)))
    finally:
        ray.shutdown()
    print(json.dumps(summary, indent=1))
    return 0 if summary["equal"] else 1


async def _both(operations: int, kills: int, rng: random.Random) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        backend = await RayBackend.start(MODEL, RayConfig(replicas=2), rank=8, checkpoint_dir=Path(directory))
        try:
            await backend.save_full_state("fresh")
            expected = await _run(backend, operations, Killer(0, operations, rng))
            await backend.load_state(str(Path(directory) / "fresh"), with_optimizer=True)
            killer = Killer(kills, operations, rng)
            found = await _run(backend, operations, killer)
        finally:
            await backend.close()
    equal = {key: _equal(found[key], expected[key]) for key in ("losses", "logprobs", "samples", "weights", "step")}
    return {
        "operations": operations,
        "kills": killer.done,
        "equal": all(equal.values()) and killer.done == kills,
        "equal_parts": equal,
        "seconds": {"unbroken": round(expected["seconds"], 1), "with_kills": round(found["seconds"], 1)},
    }


async def _run(backend: RayBackend, operations: int, killer: Killer) -> dict[str, Any]:
    """Operations one after another, with the kills that fall due beside them."""
    started = time.monotonic()
    losses, logprobs, samples = [], [], []
    for operation in range(operations):
        killer.reached(operation)
        if operation % 2 == 0:
            output = await backend.forward_backward_async(_data(operation), loss_fn="importance_sampling")
            losses.append(output.metrics["loss:sum"])
            logprobs.append(torch.cat([each["logprobs"].to_torch() for each in output.loss_fn_outputs]))
        else:
            await backend.optim_step_async(types.AdamParams(learning_rate=1e-3))
        if operation % 20 == 19:
            client = await backend.snapshot_sampling_client()
            params = types.SamplingParams(max_tokens=16, seed=operation)
            response = await client.sample_async(PROMPT, 4, params)
            samples.append([sequence.tokens for sequence in response.sequences])
    killer.join()
    weights = {name: tensor.detach().clone() for name, tensor in backend._model.adapter.named_tensors()}
    return {
        "losses": losses,
        "logprobs": logprobs,
        "samples": samples,
        "weights": weights,
        "step": backend.step,
        "seconds": time.monotonic() - started,
    }


def _data(seed: int) -> list[types.Datum]:
    """Three groups of four replies."""
    rng = random.Random(seed)
    data = []
    for _ in range(3):
        prompt = [rng.randrange(200) for _ in range(40)]
        for _ in range(4):
            tokens = prompt + [rng.randrange(200) for _ in range(rng.randint(4, 40))]
            own = len(tokens) - len(prompt)
            inputs: Any = {
                "target_tokens": tokens[1:],
                "logprobs": [0.0] * (len(prompt) - 1) + [-5.0] * own,
                "advantages": [0.0] * (len(prompt) - 1) + [rng.choice([-1.0, 1.0])] * own,
            }
            data.append(types.Datum(types.ModelInput.from_ints(tokens[:-1]), inputs))
    return data


def _equal(found: Any, expected: Any) -> bool:
    if isinstance(expected, torch.Tensor):
        return torch.equal(found, expected)
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(_equal(found[key], expected[key]) for key in expected)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(_equal, found, expected))
    return bool(found == expected)


class Killer:
    """Kills a replica of this process's cluster at some random operations, a random moment after each has begun.

    Attributes:
        done: kills so far.
    """

    def __init__(self, kills: int, operations: int, rng: random.Random) -> None:
        self.done = 0
        self._rng = rng
        self._due = sorted(rng.sample(range(operations), kills))
        self._threads: list[threading.Thread] = []

    def reached(self, operation: int) -> None:
        """An operation begins."""
        if self._due and operation >= self._due[0]:
            self._due.pop(0)
            self._threads.append(threading.Thread(target=self._kill, args=(self._rng.uniform(0.0, 0.3),)))
            self._threads[-1].start()

    def join(self) -> None:
        """Wait until every kill is done."""
        for thread in self._threads:
            thread.join()

    def _kill(self, delay: float) -> None:
        time.sleep(delay)
        while not (found := _replicas()):  # both are being started: until one has a process again
            time.sleep(0.05)
        self._rng.choice(found).kill()
        self.done += 1


def _replicas() -> list[psutil.Process]:
    """The processes of this process's replicas, also of those that are still loading."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::Replica"):
                found.append(process)
        except psutil.Error:
            continue  # it ended meanwhile
    return found


if __name__ == "__main__":
    sys.exit(main())
