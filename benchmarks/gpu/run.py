"""Training steps of this package beside a plain PEFT loop on one GPU, in one process, strictly interleaved.

    benchmarks/gpu/run.sh [--repeats N] [--models 0.6B 4B] [--device cpu --small]

Qwen3 shapes with random weights in bf16, LoRA rank 16 on all linear layers; the peer runs SDPA on padded batches, as
many sequences at once as memory holds. Before anything is timed, gradients are compared: on a small fp32 model with the
engine's own plain path (1e-5), and for each model and workload in bf16 with the peer's. Writes benchmarks/out/gpu.json.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "cpu"))

from table import Row, print_head, print_row, row, write
from useful import useful_flops
from worker import Step, ours, peft
from workloads import SMALL, Sequence, Shape, workload

H200_FLOPS = 989e12  # dense bf16
SHAPES = {
    "0.6B": Shape(vocab=151_936, hidden=1024, inner=3072, layers=28, heads=16, kv_heads=8, head_dim=128),
    "4B": Shape(vocab=151_936, hidden=2560, inner=9728, layers=36, heads=32, kv_heads=8, head_dim=128),
}
GOALS = {
    "4B: W1 vs plain PEFT": (4.0, 8.0),
    "4B: W2 vs plain PEFT": (3.0, 5.0),
    "4B: W3 model FLOP utilisation": (0.4, 0.55),
}
FP32_TOLERANCE = 1e-5
BF16_TOLERANCE = 0.1
"""Of the whole gradient's norm: bf16 keeps 8 bits, and both ways round in every layer."""


class Timed:
    """A way to compute steps, with a clock that waits for the device."""

    def __init__(self, step: Step, device: str) -> None:
        self._step = step
        self._device = device

    def __call__(self, data: list[Sequence]) -> tuple[float, dict[str, Tensor], dict[str, float]]:
        """``(seconds, gradient, metrics)``; the metrics have ``peak_bytes`` where the device counts them."""
        is_cuda = self._device == "cuda"
        if is_cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        gradient, metrics = self._step(data)
        if is_cuda:
            torch.cuda.synchronize()
            metrics = {**metrics, "peak_bytes": float(torch.cuda.max_memory_allocated())}
        return time.perf_counter() - start, gradient, metrics


def relative_gap(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Norm of the difference of two whole gradients, relative to that of ``expected``."""
    difference = sum(float((found[n].double() - g.double()).square().sum()) for n, g in expected.items())
    return float((difference / sum(float(g.double().square().sum()) for g in expected.values())) ** 0.5)


def check_fp32(device: str) -> None:
    """The engine's two paths on a small fp32 model; ends the run where they differ."""
    torch.backends.cuda.matmul.allow_tf32 = False
    for name in ("W1", "W2", "W2v", "W3"):
        data = workload(name, SMALL)
        fast, plain = (ours(SMALL, path=path, device=device)(data)[0] for path in ("auto", "plain"))
        gap = max(float((fast[n] - g).abs().max() / g.abs().max()) for n, g in plain.items())
        print(f"fp32, small, {name}: gradient differs from the plain path's by {gap:.1e}", flush=True)
        if gap > FP32_TOLERANCE:
            raise SystemExit(f"{name}: the gradients of the two paths are not equal in fp32")


def compared(title: str, name: str, ways: dict[str, Timed], shape: Shape, repeats: int) -> list[Row]:
    """The rows of one workload; both ways have warmed up on it before they are timed."""
    data = workload(name, shape)
    gradients, metrics = {}, {}
    for role, way in ways.items():
        _, gradients[role], metrics[role] = way(data)
    gap = relative_gap(gradients["ours"], gradients["plain"])
    print(f"{title}, {name}: gradient differs from plain PEFT's by {gap:.1e} of its norm", flush=True)
    if gap > BF16_TOLERANCE:
        raise SystemExit(f"{title}, {name}: the gradients are further apart than bf16 explains")
    seconds: dict[str, list[float]] = {role: [] for role in ways}
    for _ in range(repeats):
        for role, way in ways.items():
            took, _, metrics[role] = way(data)
            seconds[role].append(took)
    for role in ways:
        peak = metrics[role].get("peak_bytes", 0.0) / 2**30
        print(f"{title}, {name}: {role} {min(seconds[role]):.3f} s, peak {peak:.1f} GiB", flush=True)
    ratios = [a / b for a, b in zip(seconds["plain"], seconds["ours"], strict=True)]
    label = name.partition("x")[0]
    rows = [row(f"{title}: {label} vs plain PEFT", ratios, GOALS)]
    if label == "W3":
        useful = useful_flops(data, shape)
        shares = [useful / s / H200_FLOPS for s in seconds["ours"]]
        rows.append(row(f"{title}: W3 model FLOP utilisation", shares, GOALS))
    return rows


def model_rows(title: str, shape: Shape, args: argparse.Namespace) -> list[Row]:
    """All rows of one model; its memory is free again afterwards."""
    place: dict[str, Any] = {"device": args.device, "dtype": torch.bfloat16}
    ways = {"ours": Timed(ours(shape, **place), args.device), "plain": Timed(peft(shape, **place), args.device)}
    rows = []
    for name in ("W1", "W2", "W3" if args.small else "W3x64"):
        rows += compared(title, name, ways, shape, args.repeats)
    del ways
    gc.collect()
    if args.device == "cuda":
        torch.cuda.empty_cache()
    return rows


def main() -> None:
    """Check, measure, print the table, write the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="a small model and short sequences: a check, no figures")
    parser.add_argument("--models", nargs="*", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "out" / "gpu.json")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("this torch sees no GPU; --device cpu --small only shows that the benchmark runs")
    shapes = {"small": SMALL} if args.small else {title: SHAPES[title] for title in args.models}
    check_fp32(args.device)
    rows: list[Row] = []
    for title, shape in shapes.items():
        rows += model_rows(title, shape, args)
    print_head()
    for r in rows:
        print_row(r)
    name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    write(args.out, rows, device=name, size="small" if args.small else "full")


if __name__ == "__main__":
    main()
