"""One way to compute a training step, in a process of its own: reads a line of JSON, answers with a line of JSON.

``ours`` is this package; ``plain`` is the loop a PEFT user writes (the whole batch padded, or as much of it as memory
holds, and all logits), ``plain8`` the same in batches of 8; ``trl`` is TRL's own loss path. All have the same weights.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from tinker import types
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from models import engine_model, peft_model
from trl_peer import TrlPath
from workloads import FULL, SMALL, Sequence, Shape, workload

from nat_plugin_evsys.engine.machine.memory import free_bytes

OLD_LOGPROB = -10.0


def advantages(index: int, mask: list[bool]) -> list[float]:
    """Of one sign for a sequence, as in a group."""
    value = 1.0 if index % 2 else -0.7
    return [value if trained else 0.0 for trained in mask]


def as_datums(data: list[Sequence]) -> list[types.Datum]:
    """For the loss ``importance_sampling``."""
    return [
        types.Datum(
            types.ModelInput.from_ints(ids[:-1]),
            {
                "target_tokens": ids[1:],
                "logprobs": [OLD_LOGPROB] * (len(ids) - 1),
                "advantages": advantages(i, mask)[1:],
            },
        )
        for i, (ids, mask) in enumerate(data)
    ]


Step = Callable[[list[Sequence]], tuple[dict[str, Tensor], dict[str, float]]]
"""``data -> (gradient, metrics)``."""


def ours(
    shape: Shape,
    path: str = "auto",
    lean: bool = True,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    weights: Mapping[str, Tensor] | None = None,
) -> Step:
    """This package's engine; ``lean`` computes no logprobs that the loss does not read."""
    from nat_plugin_evsys.engine.gradient.trainable import TrainableModel

    base, adapter = engine_model(shape, device, dtype, weights)
    model = TrainableModel(base, adapter, path=path, untrained_logprobs=not lean)  # type: ignore[arg-type]

    def step(data: list[Sequence]) -> tuple[dict[str, Tensor], dict[str, float]]:
        metrics = model.forward_backward(as_datums(data), "importance_sampling").metrics
        assert path == "plain" or metrics["plain_path_tokens:sum"] == 0, metrics
        assert model.gradient is not None
        gradient = dict(model.gradient)
        model.discard_gradient()
        return gradient, metrics

    return step


def peft(
    shape: Shape,
    *,
    largest: int | None = None,
    trl: bool = False,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Step:
    """Hugging Face's model with PEFT's adapter, padded batches of ``largest`` or of what memory holds."""
    model, named = peft_model(shape, device, dtype)
    trl_path = TrlPath(model) if trl else None

    def step(data: list[Sequence]) -> tuple[dict[str, Tensor], dict[str, float]]:
        nonlocal largest
        batch = min(largest or len(data), batch_that_fits(data, shape, device, dtype))
        try:
            accumulate(data, batch)
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
            largest = batch // 2  # the estimate was too high, and this is for all steps to come
            return step(data)
        return {name: p.grad for name, p in named.items() if p.grad is not None}, {"batch": float(batch)}

    def accumulate(data: list[Sequence], batch: int) -> None:
        for parameter in named.values():
            parameter.grad = None
        for start in range(0, len(data), batch):
            rows = list(enumerate(data))[start : start + batch]
            width = max(len(ids) for _, (ids, _) in rows)
            ids = torch.tensor([s + [0] * (width - len(s)) for _, (s, _) in rows], device=device)
            real = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for _, (s, _) in rows], device=device)
            signs = [advantages(i, m) + [0.0] * (width - len(m)) for i, (_, m) in rows]
            weights = torch.tensor(signs, device=device)[:, 1:]
            if trl_path is not None:
                completion = width - max(1, min(m.index(True) for _, (_, m) in rows))
                logprobs, weights = trl_path.logprobs(ids, real, completion), weights[:, -completion:]
            else:
                logits = model(input_ids=ids, attention_mask=real).logits[:, :-1]
                logprobs = logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
            loss = -(torch.exp(logprobs - OLD_LOGPROB) * weights).sum()
            loss.backward()

    return step


def batch_that_fits(data: list[Sequence], shape: Shape, device: str, dtype: torch.dtype) -> int:
    """All sequences, or as many as the free memory holds in batches of equal size."""
    # Measured: what autograd keeps for a token, with four copies of its logits.
    per_token = dtype.itemsize * shape.layers * (8 * shape.hidden + 5 * shape.inner) + 4 * 4 * shape.vocab
    needed = 1.15 * per_token * len(data) * max(len(ids) for ids, _ in data)
    free = free_bytes(torch.device(device))
    return math.ceil(len(data) / math.ceil(needed / free))


def gemm_peak(shape: Shape, clock: Callable[[], float] = time.process_time) -> float:
    """FLOP/s of the best fp32 matrix product of the model's own shape: of MKL's and, where there is one, oneDNN's."""
    from nat_plugin_evsys.engine.machine.products import product, reordered

    a, weight = torch.randn(4096, shape.hidden), torch.randn(shape.inner, shape.hidden)
    out, fast = torch.empty(4096, shape.inner), reordered(weight)
    best = float("inf")
    for _ in range(6):
        start = clock()
        torch.mm(a, weight.T, out=out)
        middle = clock()
        product(a, fast)
        best = min(best, middle - start, clock() - middle)
    return 2 * 4096 * shape.hidden * shape.inner / best


ROLES: dict[str, Callable[[Shape], Step]] = {
    "ours": ours,
    "ours_all_logprobs": lambda shape: ours(shape, lean=False),
    "plain": peft,
    "plain8": lambda shape: peft(shape, largest=8),
    "trl": lambda shape: peft(shape, trl=True),
}
CLOCKS: dict[str, Callable[[], float]] = {"cpu": time.process_time, "wall": time.perf_counter}


def main() -> None:
    """``worker.py ROLE full|small THREADS cpu|wall``: loads, then forks a process for every workload.

    A fork starts with the memory of a process that has computed nothing yet, without loading everything again. Lines
    are ``{"begin": true}``, then ``{"workload": name, "save": path or null}`` any number of times, then ``null``.
    """
    role, size, threads, clock = sys.argv[1:]
    torch.set_num_threads(1)  # a thread pool would not survive the fork
    shape = SMALL if size == "small" else FULL
    step = ROLES[role](shape)
    print(json.dumps({"ready": True}), flush=True)
    while sys.stdin.readline():
        if child := os.fork():
            if os.waitpid(child, 0)[1]:
                sys.exit(1)
            print(json.dumps({"ended": True}), flush=True)  # before that, what is asked reaches the fork
            continue
        torch.set_num_threads(int(threads))
        _answer(step, shape, CLOCKS[clock])
        os._exit(0)


def _answer(step: Step, shape: Shape, clock: Callable[[], float]) -> None:
    """One workload's requests."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step([(list(range(24)), [False] * 8 + [True] * 16)])  # what is loaded or probed once is no part of a step
    print(json.dumps({"ready": True}), flush=True)
    while request := json.loads(sys.stdin.readline() or "null"):
        data = workload(request["workload"], shape)
        start = clock()
        gradient, metrics = step(data)
        seconds = clock() - start
        if request.get("save"):
            torch.save(gradient, request["save"])
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        peak = gemm_peak(shape, clock) if request.get("gemm") else None
        print(json.dumps({"seconds": seconds, "peak_kib": used, "gemm": peak, "metrics": metrics}), flush=True)


if __name__ == "__main__":
    main()
