"""How much of a second replica arrives: training steps and rollouts on one and on two replicas of one thread each.

    make bench-ray [ARGS="--small"]

The workloads and the model are those of benchmarks/cpu; ``rollouts`` is 64 requests of their own (one full batch, of
which each of two replicas has half), ``rollouts-128`` two such batches, and ``quickstart`` a whole step of
``quickstart_worker.py`` on SmolLM2-135M. Of every part it prints

- wall seconds, with one and with two replicas, and their efficiency, ``wall_1 / (2 wall_2)``;
- the same by CPU seconds: those of the busier replica plus those of the process that drives them, as if nothing of
  the two overlapped. On a machine that other work keeps busy this is the figure that says something.
- bytes that a step moves: the weights and each replica's gradient.

Before that, what moving weights and gradients costs on this machine, in GB/s: ``put`` and ``get`` by Ray's object
store, ``sum`` of one more gradient, ``hash``. The model on paper in docs/scaling.md stands on these; ``--constants``
measures nothing else.

Medians over the repeats; what comes first (checks of the fast paths, imports) is left out.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
from tinker import types

sys.path.insert(0, str(Path(__file__).parents[1] / "cpu"))

import quickstart_worker as quickstart
import rollouts_worker
from models import ALPHA, RANK, build_model
from workloads import FULL, SMALL, Shape, workload

from nat_plugin_evsys.backends.ray import RayBackend
from nat_plugin_evsys.config.ray import RayConfig
from nat_plugin_evsys.engine.model.loading import load_tokenizer
from nat_plugin_evsys.replicas.weights import digest

PARTS = ("W1", "W2", "R1", "rollouts", "rollouts-128", "quickstart")
_BYTES = 100_000_000
PROMPTS, SAMPLES, PROMPT_TOKENS, TOKENS = 8, 8, 256, 64


def main() -> None:
    """Measure and print."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument(
        "--small", action="store_true", help="a small model and short sequences: a check, no figures"
    )
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument("--only", nargs="*", default=PARTS, choices=PARTS)
    arguments.add_argument("--constants", action="store_true", help="only what moving weights and gradients costs")
    options = arguments.parse_args()
    shape = SMALL if options.small else FULL
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory) / "model"
        build_model(shape).save_pretrained(model)
        load_tokenizer("builtin/tiny").save_pretrained(model)
        ray.init(num_cpus=2, object_store_memory=400 << 20, include_dashboard=False, log_to_driver=False)
        try:
            print(json.dumps({"gigabytes_per_second": _constants()}))
            if options.constants:
                return
            found = {}
            for replicas in (1, 2):
                found[replicas] = asyncio.run(_found(model, replicas, shape, options))
                print(json.dumps({"replicas": replicas, **found[replicas]}), flush=True)
        finally:
            ray.shutdown()
    print(json.dumps({"efficiency": {name: _efficiency(found[1][name], found[2][name]) for name in found[1]}}))


def _constants() -> dict[str, float]:
    values = np.ones(_BYTES // 4, np.float32)
    total = values.copy()

    @ray.remote(num_cpus=1)
    def fetched(reference: list[Any]) -> float:
        started = time.perf_counter()
        ray.get(reference[0]).copy()
        return time.perf_counter() - started

    def timed(run: Callable[[], Any]) -> float:
        started = time.perf_counter()
        run()
        return time.perf_counter() - started

    seconds: dict[str, list[float]] = {"put": [], "get": [], "sum": [], "hash": []}
    for _ in range(5):
        seconds["put"].append(timed(lambda: ray.put(values)))
        seconds["get"].append(ray.get(fetched.remote([ray.put(values)])))
        seconds["sum"].append(timed(lambda: np.add(total, values, out=total)))
        seconds["hash"].append(timed(lambda: digest(values)))
    return {name: round(_BYTES / 1e9 / statistics.median(each), 2) for name, each in seconds.items()}


def _efficiency(one: dict[str, float], two: dict[str, float]) -> dict[str, float]:
    return {clock: round(one[clock] / (2 * two[clock]), 3) for clock in ("wall", "cpu")}


async def _found(model: Path, replicas: int, shape: Shape, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    real = quickstart.MODELS["small" if options.small else "full"]
    parts = [(str(model), [name for name in options.only if name != "quickstart"], RANK, ALPHA)]
    parts += [(real, [name for name in options.only if name == "quickstart"], quickstart.RANK, quickstart.ALPHA)]
    found = {}
    for number, (base_model, names, rank, alpha) in enumerate(parts):
        if not names:
            continue
        backend = await RayBackend.start(
            base_model,
            RayConfig(replicas=replicas),
            rank=rank,
            alpha=alpha,
            checkpoint_dir=model.parent / f"checkpoints-{replicas}-{number}",
            untrained_logprobs=False,
            device="cpu",
        )
        try:
            for name in names:
                found[name] = await _median(backend, await _part(backend, name, shape), options.repeats)
        finally:
            await backend.close()
    return found


async def _part(backend: RayBackend, name: str, shape: Shape) -> Callable[[], Awaitable[dict[str, float]]]:
    """What is measured under that name."""
    if name in ("rollouts", "rollouts-128"):
        return lambda: _rollout(backend, shape, PROMPTS if name == "rollouts" else 2 * PROMPTS)
    if name == "R1":
        return lambda: _r1(backend, shape)
    if name == "quickstart":
        steps = quickstart.OurSteps(backend, (await backend.snapshot_sampling_client()).get_tokenizer())
        return lambda: _sampled(steps.step())
    data = [_datum(ids, mask) for ids, mask in workload(name, shape)]
    return lambda: _step(backend, data)


async def _median(
    backend: RayBackend, run: Callable[[], Awaitable[dict[str, float]]], repeats: int
) -> dict[str, float]:
    rows = []
    for repeat in range(repeats + 1):
        processes = [psutil.Process(each["pid"]) for each in await asyncio.to_thread(backend.replicas)]
        before, started = _cpu(processes), time.perf_counter()
        facts = await run()
        wall, after = time.perf_counter() - started, _cpu(processes)
        here, *theirs = (b - a for a, b in zip(before, after, strict=True))
        if repeat:
            rows.append({"wall": wall, "cpu": here + max(theirs), "cpu_here": here, **facts})
    return {key: round(statistics.median(row[key] for row in rows), 3) for key in rows[0]}


def _cpu(processes: list[psutil.Process]) -> list[float]:
    """CPU seconds of this process and of each replica, so far."""
    times = [process.cpu_times() for process in (psutil.Process(), *processes)]
    return [each.user + each.system for each in times]


async def _step(backend: RayBackend, data: list[types.Datum]) -> dict[str, float]:
    output = await backend.forward_backward_async(data, loss_fn="importance_sampling")
    await backend.optim_step_async(types.AdamParams(learning_rate=1e-4))
    names = ("computed_tokens:sum", "replica_imbalance:max", "replica_repeated_tokens:sum")
    weights = 4 * sum(tensor.numel() for _, tensor in backend._model.adapter.named_tensors())
    replicas = output.metrics["replicas:max"]
    return {**{name: output.metrics[name] for name in names}, "weight_bytes": weights, "moved": weights * 2 * replicas}


async def _rollout(backend: RayBackend, shape: Shape, count: int) -> dict[str, float]:
    client = await backend.snapshot_sampling_client()
    params = types.SamplingParams(max_tokens=TOKENS // shape.divide, temperature=1.0, stop=[], seed=0)
    prompts = [list(range(i, i + PROMPT_TOKENS // shape.divide)) for i in range(count)]
    calls = [client.sample_async(types.ModelInput.from_ints(p), 1, params) for p in prompts for _ in range(SAMPLES)]
    responses = await asyncio.gather(*calls)
    return {"sampled_tokens": float(sum(len(s.tokens) for r in responses for s in r.sequences))}


async def _r1(backend: RayBackend, shape: Shape) -> dict[str, float]:
    client = await backend.snapshot_sampling_client()

    class Engine:
        def sample(self, prompts: list[list[int]], samples: int, tokens: int) -> list[list[int]]:
            params = types.SamplingParams(max_tokens=tokens, temperature=1.0, stop=[], seed=0)
            futures = [client.sample(types.ModelInput.from_ints(prompt), samples, params) for prompt in prompts]
            return [sequence.tokens for future in futures for sequence in future.result().sequences]

    return {"sampled_tokens": float(await asyncio.to_thread(rollouts_worker.r1, Engine(), shape))}


async def _sampled(tokens: Awaitable[int]) -> dict[str, float]:
    return {"sampled_tokens": float(await tokens)}


def _datum(ids: list[int], mask: list[bool]) -> types.Datum:
    advantages = [float(trained) for trained in mask[1:]]
    inputs: Any = {"target_tokens": ids[1:], "logprobs": [-10.0 * a for a in advantages], "advantages": advantages}
    return types.Datum(types.ModelInput.from_ints(ids[:-1]), inputs)


if __name__ == "__main__":
    main()
