"""Resuming in a new process continues bit for bit; without the optimizer state it does not."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tinker import types
from tiny import PROVED

from nat_plugin_evsys.backends.local import LocalBackend

LORA = {"rank": 4, "alpha": 8.0, "seed": 5, "train_unembed": True}


def batch(step: int) -> tuple[str, list[types.Datum]]:
    """Ragged Datums of one step, and its loss: supervised and policy-gradient steps in turn."""
    rng = random.Random(step)
    loss_fn = "cross_entropy" if step % 2 else "importance_sampling"
    data = []
    for _ in range(5):
        n = rng.randrange(3, 25)
        inputs: dict[str, Any] = {"target_tokens": [rng.randrange(200) for _ in range(n)]}
        if loss_fn == "importance_sampling":
            inputs["logprobs"] = [rng.uniform(-7, -4) for _ in range(n)]
            inputs["advantages"] = [rng.uniform(-1, 1) for _ in range(n)]
        data.append(types.Datum(types.ModelInput.from_ints([rng.randrange(200) for _ in range(n)]), inputs))
    return loss_fn, data


def adam(step: int) -> types.AdamParams:
    """A schedule with decay and, at some steps, clipping."""
    return types.AdamParams(learning_rate=1e-2 / (1 + step), weight_decay=0.01, grad_clip_norm=[0.0, 1.0][step % 2])


async def train(backend: LocalBackend, first: int, last: int) -> list[float]:
    """Steps ``first`` to ``last - 1``; the loss of each."""
    losses = []
    for step in range(first, last):
        loss_fn, data = batch(step)
        output = await backend.forward_backward_async(data, loss_fn=loss_fn)
        await backend.optim_step_async(adam(step))
        losses.append(output.metrics["loss:sum"])
    return losses


CHILD = """
import asyncio, importlib.util, json, sys
spec = importlib.util.spec_from_file_location("shared_steps", sys.argv[1])
steps = importlib.util.module_from_spec(spec)
spec.loader.exec_module(steps)
work = getattr(steps, sys.argv[2])
print(json.dumps({family: asyncio.run(work(*given)) for family, given in json.loads(sys.argv[3]).items()}))
"""


async def in_new_process(work: str, plan: dict[str, list[str]]) -> dict[str, Any]:
    """What a function of this module gives for each family. Any two new processes compute with equally many threads."""
    command = [sys.executable, "-c", CHILD, __file__, work, json.dumps(plan)]
    run = partial(subprocess.run, capture_output=True, text=True, timeout=200)
    done = await asyncio.to_thread(run, command, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "adapter_model.safetensors") | load_file(path / "optimizer.safetensors")


def differing(one: Path, other: Path) -> tuple[int, int]:
    """How many of the tensors (weights and moments) of two checkpoints differ in a bit, and of how many."""
    a, b = tensors(one), tensors(other)
    assert a.keys() == b.keys()
    return sum(not torch.equal(a[name], b[name]) for name in a), len(a)


async def straight(model: str, out: str) -> tuple[list[float], str]:
    """Six steps without a break, saved half way and at the end: the last three losses, the checkpoint half way."""
    backend = await LocalBackend.create(model, checkpoint_dir=Path(out), device="cpu", **LORA)
    await train(backend, 0, 3)
    half = await backend.save_full_state("half")
    losses = await train(backend, 3, 6)
    await backend.save_full_state("straight")
    await backend.close()
    return losses, half


async def resumed(model: str, out: str, half: str) -> list[list[float]]:
    """The last three losses from the checkpoint half way, with the optimizer's state and without."""
    losses = []
    for name, with_optimizer in (("resumed", True), ("weights", False)):
        backend = await LocalBackend.create(model, checkpoint_dir=Path(out), device="cpu", **{**LORA, "seed": 99})
        await backend.load_state(half, with_optimizer=with_optimizer)
        assert backend.step == 3
        losses.append(await train(backend, 3, 6))
        await backend.save_full_state(name)
        await backend.close()
    return losses


async def test_three_and_three_steps_are_six(
    model_dir: Callable[[str], Path], measured: Callable[..., None], tmp_path: Path
) -> None:
    plan = {family: [str(model_dir(family)), str(tmp_path / family)] for family in PROVED}
    unbroken = await in_new_process("straight", plan)
    resumes = await in_new_process("resumed", {family: [*plan[family], half] for family, (_, half) in unbroken.items()})
    for family, (full, weights_only) in resumes.items():
        out, (losses, _) = tmp_path / family, unbroken[family]
        wrong, total = differing(out / "resumed", out / "straight")
        wrong += sum(a != b for a, b in zip(full, losses, strict=True))
        measured(
            "3 resume", "6 steps vs 3 + new process + 3: weights, moments and losses (differing)", PROVED[family],
            worst=wrong, bound=0, tensors=total, losses=3,
        )  # fmt: skip
        # The first loss is taken before a step, at the same weights; the moments matter from then on.
        assert weights_only[0] == losses[0]
        assert weights_only[1:] != losses[1:]
        wrong, total = differing(out / "weights", out / "straight")
        assert wrong == total, "a weights-only load must end elsewhere"
