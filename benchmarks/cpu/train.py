"""Training steps of this package beside those of its peers, strictly interleaved, one thread each.

    python benchmarks/cpu/train.py [--small] [--repeats N] [--only W1 W2 ...] [--out benchmarks/out/cpu.json]

Every way runs in a process of its own (the engine changes its process's allocator, which peers' users do not), and the
processes take turns. A ratio is that of CPU seconds in one round; the table has the median, the least and the greatest.
In the first round, which is not timed, the gradients of all ways are compared: a difference fails the run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from workloads import FULL, SMALL, Shape, workload

GRADIENT_TOLERANCE = 1e-5
FLOORS: dict[str, tuple[float, float]] = {
    "W1 vs plain PEFT": (9.0, 12.0),
    "W2 vs plain PEFT": (4.5, 6.0),
    "W2v vs plain PEFT": (6.0, 9.0),
    "W3 vs plain PEFT": (2.7, 3.5),
    "W1 vs TRL's path": (6.0, 8.0),
    "W2 vs TRL's path": (3.7, 5.0),
    "W1 useful FLOP/s of GEMM peak": (0.6, 0.75),
    "W2 useful FLOP/s of GEMM peak": (0.6, 0.75),
    "W2 peak memory vs plain PEFT": (0.35, 0.2),
    "time per distinct token, 64 vs 8 samples": (1.15, 1.05),
}


class Worker:
    """One process that computes steps in one way."""

    def __init__(self, role: str, size: str) -> None:
        script = Path(__file__).parent / "worker.py"
        self.role = role
        self._process = subprocess.Popen(
            [sys.executable, str(script), role, size], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._answer()

    def step(self, name: str, save: Path | None = None, gemm: bool = False) -> dict[str, Any]:
        """One step: CPU seconds, growth of peak memory since the start in KiB, FLOP/s of a matrix product."""
        assert self._process.stdin is not None
        request = {"workload": name, "save": None if save is None else str(save), "gemm": gemm}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"worker {self.role} ended with {self._process.wait(60)}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def gradient_gap(a: Path, b: Path) -> float:
    """Largest difference of any tensor, relative to that tensor's largest value."""
    import torch

    found, expected = torch.load(a), torch.load(b)
    if set(found) != set(expected):
        raise RuntimeError(f"gradients of different tensors: {sorted(set(found) ^ set(expected))[:4]}")
    return max(float((found[n] - g).abs().max() / g.abs().max()) for n, g in expected.items())


def useful_flops(name: str, shape: Shape) -> float:
    """Multiply-adds, times two, that no exact algorithm for this step with frozen weights can leave out.

    Distinct tokens through the linear layers (forward, and gradient by the input), their LoRA pairs (and gradients by
    both), attention (forward, and four of its seven products backward), and the output head at trained positions.
    """
    distinct: dict[tuple[int, ...], bool] = {}
    pairs = 0
    for ids, mask in workload(name, shape):
        for i in range(len(ids) - 1):
            key = tuple(ids[: i + 1])
            if key not in distinct:
                pairs += i + 1
            distinct[key] = distinct.get(key, False) or mask[i + 1]
    query, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    shapes = [(shape.hidden, query), (shape.hidden, kv), (shape.hidden, kv), (query, shape.hidden)]
    shapes += [(shape.hidden, shape.inner)] * 2 + [(shape.inner, shape.hidden)]
    linear = sum(a * b for a, b in shapes)
    lora = sum(16 * (a + b) for a, b in shapes)
    per_layer = len(distinct) * (4 * linear + 6 * lora) + pairs * query * 2 * (2 + 4)
    return shape.layers * per_layer + sum(distinct.values()) * 4 * shape.hidden * shape.vocab


def compare(workers: dict[str, Worker], name: str, repeats: int, folder: Path) -> dict[str, list[float]]:
    """CPU seconds of each way, round by round; KiB under ``<role> kib``, FLOP/s under ``gemm``."""
    gradients = {role: folder / f"{name}-{role}.pt" for role in workers}
    out: dict[str, list[float]] = {"gemm": []}
    for role, worker in workers.items():
        out[f"{role} kib"] = [worker.step(name, gradients[role])["peak_kib"]]
        out[role] = []
    for role in workers:
        if role != "plain":
            gap = gradient_gap(gradients[role], gradients["plain"])
            print(f"{name}: gradient of {role} differs from plain PEFT by {gap:.1e}", flush=True)
            if gap > GRADIENT_TOLERANCE:
                raise SystemExit(f"{name}: the gradients of {role} and plain PEFT are not equal")
    for _ in range(repeats):
        for role, worker in workers.items():
            answer = worker.step(name, gemm=role == "ours")
            out[role].append(answer["seconds"])
            if answer["gemm"]:
                out["gemm"].append(answer["gemm"])
    return out


def row(name: str, values: list[float]) -> dict[str, Any]:
    """A row of the table: median, least and greatest."""
    floor, aim = FLOORS.get(name, (None, None))
    ratio = statistics.median(values)
    return {"name": name, "ratio": ratio, "floor": floor, "aim": aim, "min": min(values), "max": max(values)}


def rows_of(name: str, times: dict[str, list[float]], shape: Shape) -> list[dict[str, Any]]:
    """All rows of one workload."""

    def ratios(of: str) -> list[float]:
        return [a / b for a, b in zip(times[of], times["ours"], strict=True)]

    rows = [row(f"{name} vs plain PEFT", ratios("plain"))]
    if "ours_lean" in times:
        lean = [a / b for a, b in zip(times["plain"], times["ours_lean"], strict=True)]
        rows.append(row(f"{name} without untrained logprobs vs plain PEFT", lean))
    if "trl" in times and name in ("W1", "W2"):
        rows.append(row(f"{name} vs TRL's path", ratios("trl")))
    if name in ("W1", "W2"):
        useful = useful_flops(name, shape)
        shares = [useful / seconds / peak for seconds, peak in zip(times["ours"], times["gemm"], strict=True)]
        rows.append(row(f"{name} useful FLOP/s of GEMM peak", shares))
    if name == "W2":
        rows.append(row("W2 peak memory vs plain PEFT", [times["ours kib"][0] / max(1.0, times["plain kib"][0])]))
    return rows


def measure(name: str, roles: list[str], size: str, repeats: int) -> list[dict[str, Any]]:
    """The rows of one workload, from new processes, so that each one's peak memory is its own."""
    workers = {role: Worker(role, size) for role in roles if role != "trl" or name in ("W1", "W2")}
    with tempfile.TemporaryDirectory() as folder:
        times = compare(workers, name, repeats, Path(folder))
    for worker in workers.values():
        worker.close()
    return rows_of(name, times, SMALL if size == "small" else FULL)


def growth(size: str, repeats: int) -> list[dict[str, Any]]:
    """Time per distinct token with 64 samples over that with 8, of one group."""
    shape = SMALL if size == "small" else FULL
    distinct = {n: 512 // shape.divide + n * (64 // shape.divide) for n in (8, 64)}
    worker = Worker("ours", size)
    values = []
    for index in range(repeats + 1):
        each = {n: worker.step(f"G{n}")["seconds"] / distinct[n] for n in (8, 64)}
        if index:
            values.append(each[64] / each[8])
    worker.close()
    return [row("time per distinct token, 64 vs 8 samples", values)]


def main() -> None:
    """Measure, print the table, write the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a small model and short sequences: a check, no figures")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=["W1", "W2", "W2v", "W3", "growth"])
    parser.add_argument("--roles", nargs="*", default=["ours", "plain", "trl"])
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "out" / "cpu.json")
    args = parser.parse_args()
    size = "small" if args.small else "full"
    print(f"{'':48s} {'ratio':>7s} {'floor':>7s} {'aim':>7s} {'min':>7s} {'max':>7s}")
    rows: list[dict[str, Any]] = []
    for name in args.only:
        found = growth(size, args.repeats) if name == "growth" else measure(name, args.roles, size, args.repeats)
        for r in found:
            cells = [f"{r[k]:7.2f}" if r[k] is not None else "      -" for k in ("ratio", "floor", "aim", "min", "max")]
            print(f"{r['name']:48s} {' '.join(cells)}", flush=True)
        rows += found
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"size": size, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
