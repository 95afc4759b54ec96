"""Training steps of this package beside those of its peers, strictly interleaved.

Every way runs in a process of its own (the engine changes its process's allocator, which peers' users do not), and the
processes take turns. Before anything is timed, each has done a tiny step, and ours a whole one. The gradients of all
ways are compared: a difference fails the run. A ratio is that of a peer's step and one of ours.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import trl_peer
from table import Row, row
from useful import useful_flops
from worker_process import WorkerProcess
from workloads import FULL, SMALL, workload

GRADIENT_TOLERANCE = 1e-5
GOALS: dict[str, tuple[float, float]] = {
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
WORKLOADS = ("W1", "W2", "W2v", "W3", "growth")
TITLES = {
    "plain": "vs plain PEFT",
    "plain8": "vs plain PEFT in batches of 8",
    "trl": "vs TRL's path",
    "ours_all_logprobs": "lean vs all logprobs",
}


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        size: ``full``, or ``small`` for a check whose figures mean nothing.
        repeats: steps of each peer; ours runs before and after each.
        threads: of every process.
        clock: ``wall``, or ``cpu`` seconds for a machine that does other things, with one thread.
        extra: also the rows without a floor.
    """

    size: str = "full"
    repeats: int = 1
    threads: int = 1
    clock: str = "wall"
    extra: bool = False


class Worker(WorkerProcess):
    """One way to compute steps: a process that has loaded everything, and a fork of it for each workload."""

    def __init__(self, role: str, options: Options) -> None:
        super().__init__("worker.py", role, options.size, str(options.threads), options.clock)

    def begin(self) -> None:
        """Fork: what a peak of memory is, and what is free, must not depend on the workload before."""
        self.ask({"begin": True})

    def step(self, name: str, save: Path | None = None, gemm: bool = False) -> dict[str, Any]:
        """One step: seconds, growth of peak memory since the start in KiB, FLOP/s of a matrix product, metrics."""
        return self.ask({"workload": name, "save": None if save is None else str(save), "gemm": gemm})

    def steady_step(self, name: str, save: Path | None = None) -> dict[str, Any]:
        """The second of two steps: the first one touches the memory that the engine keeps, as in a run of many."""
        self.step(name, save)
        return self.step(name, gemm=True)

    def end(self) -> None:
        """End the fork."""
        self.ask(None)


def gradient_gap(a: Path, b: Path) -> float:
    """Largest difference of any tensor, relative to that tensor's largest value."""
    import torch

    found, expected = torch.load(a), torch.load(b)
    if set(found) != set(expected):
        raise RuntimeError(f"gradients of different tensors: {sorted(set(found) ^ set(expected))[:4]}")
    return max(float((found[n] - g).abs().max() / g.abs().max()) for n, g in expected.items())


def rows(names: Sequence[str], options: Options) -> list[Row]:
    """The rows of some of ``WORKLOADS``."""
    if {"W1", "W2"} & {*names} and not trl_peer.installed():
        print("TRL's path is skipped: it is not installed; see benchmarks/cpu/trl_peer.py", flush=True)
    parts = [(name, data, peers) for name in names for data, peers in _parts(name, options)]
    workers = {role: Worker(role, options) for role in {"ours", *(p for _, _, peers in parts for p in peers)}}
    found = []
    try:
        for worker in workers.values():
            worker.wait_until_ready()
        for name, data, peers in parts:
            here = {role: workers[role] for role in ("ours", *peers)}
            for worker in here.values():
                worker.begin()
            found += _growth(here["ours"], options) if name == "growth" else _compared(name, data, here, options)
            for worker in here.values():
                worker.end()
    finally:
        for worker in workers.values():
            worker.close()
    return found


def _parts(name: str, options: Options) -> list[tuple[str, list[str]]]:
    """What is compared for one of ``WORKLOADS``: data and peers.

    TRL gets two of W1's four groups, which fill a batch of its own; four would take twice as long and tell no more.
    """
    extra = ["plain8", "ours_all_logprobs"] if options.extra else []
    trl = ["trl"] if trl_peer.installed() else []
    if name == "growth":
        return [(name, [])]
    if name == "W1":
        return [(name, ["plain", *extra]), *(("W1half", [role]) for role in trl)]
    return [(name, ["plain", *(trl if name == "W2" else []), *extra])]


def _compared(name: str, data: str, workers: dict[str, Worker], options: Options) -> list[Row]:
    """One workload. The first peer's gradient is what the others are compared with."""
    peers = [role for role in workers if role != "ours"]
    with tempfile.TemporaryDirectory() as folder:
        gradients = {role: Path(folder) / f"{role}.pt" for role in workers}
        ours = [workers["ours"].steady_step(data, gradients["ours"])]
        ratios: dict[str, list[float]] = {role: [] for role in peers}
        peak_kib = {"ours": ours[0]["peak_kib"]}
        for index in range(options.repeats):
            answers = {role: workers[role].step(data, None if index else gradients[role]) for role in peers}
            ours.append(workers["ours"].steady_step(data))
            for role, answer in answers.items():
                ratios[role] += [answer["seconds"] / o["seconds"] for o in ours[-2:]]
                peak_kib.setdefault(role, answer["peak_kib"])
                if not index:
                    _say(data, role, answer)
        _say(data, "ours", ours[-1])
        for role in ("ours", *peers[1:]):
            _check(data, role, peers[0], gradients)
    found = [row(f"{name} {TITLES[role]}", values, GOALS) for role, values in ratios.items()]
    if data in ("W1", "W2"):
        useful = useful_flops(workload(data, _shape(options)), _shape(options))
        shares = [useful / o["seconds"] / o["gemm"] for o in ours]
        found.append(row(f"{name} useful FLOP/s of GEMM peak", shares, GOALS))
    if data == "W2":
        found.append(row("W2 peak memory vs plain PEFT", [peak_kib["ours"] / max(1, peak_kib["plain"])], GOALS))
    return found


def _shape(options: Options) -> Any:
    return SMALL if options.size == "small" else FULL


def _say(name: str, role: str, answer: dict[str, Any]) -> None:
    batch = f", batches of {answer['metrics']['batch']:.0f}" if "batch" in answer["metrics"] else ""
    print(f"{name}: {role} {answer['seconds']:.1f} s, peak +{answer['peak_kib'] / 2**20:.2f} GiB{batch}", flush=True)


def _check(data: str, role: str, peer: str, gradients: dict[str, Path]) -> None:
    gap = gradient_gap(gradients[role], gradients[peer])
    print(f"{data}: gradient of {role} differs from that of {peer} by {gap:.1e}", flush=True)
    if gap > GRADIENT_TOLERANCE:
        raise SystemExit(f"{data}: the gradients of {role} and {peer} are not equal")


def _growth(worker: Worker, options: Options) -> list[Row]:
    """Time per distinct token with 64 samples over that with 8, of one group."""
    shape = _shape(options)
    distinct = {n: 512 // shape.divide + n * (64 // shape.divide) for n in (8, 64)}
    worker.step("G64")  # as in ``steady_step``
    values = []
    for _ in range(options.repeats + 1):
        each = {n: worker.step(f"G{n}")["seconds"] / distinct[n] for n in (8, 64)}
        values.append(each[64] / each[8])
    return [row("time per distinct token, 64 vs 8 samples", values, GOALS)]
