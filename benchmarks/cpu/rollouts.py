"""Rollouts of this package and of Hugging Face's, one thread each, two at a time.

    python benchmarks/cpu/rollouts.py [--small] [--repeats N] [--only R1 R2] [--continuous]

Every way has a process of its own for each workload. On each of two cores one of them is at work, the longest first;
this package's take two turns for one of a peer's. A ratio is that of CPU seconds. The table has the median, the least
and the greatest.
"""

from __future__ import annotations

import argparse
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Any

from table import Row, print_head, print_row, row
from worker_process import WorkerProcess

GOALS = {"R1 vs HF generate": (2.0, 4.0), "R2 vs HF generate": (3.0, 6.0)}
NAMES = {"generate": "HF generate", "continuous": "HF generate_batch"}
AT_A_TIME = 2


class Rollouts:
    """One way to roll out one workload."""

    def __init__(self, workload: str, role: str, size: str) -> None:
        self._workload = workload
        self._process = WorkerProcess("rollouts_worker.py", role, size)
        self._turn = Lock()

    def run(self) -> dict[str, Any]:
        """``tokens`` sampled, ``seconds`` of CPU time."""
        with self._turn:
            return self._process.ask({"workload": self._workload})

    def close(self) -> None:
        """End the process."""
        self._process.close()


def rows(
    small: bool = False, repeats: int = 1, only: tuple[str, ...] = ("R1", "R2"), continuous: bool = False
) -> list[Row]:
    """Of R1 and R2; with ``continuous``, of transformers' continuous batching too."""
    peers = ["generate", "continuous"] if continuous else ["generate"]
    longest_first = sorted(only, reverse=True)
    size = "small" if small else "full"
    ways = {(workload, role): Rollouts(workload, role, size) for workload in only for role in ("ours", *peers)}
    turns = [(workload, peer) for peer in peers for workload in longest_first] * repeats
    turns += [(workload, "ours") for _ in range(2 * repeats) for workload in longest_first]
    answers: dict[tuple[str, str], list[Future[dict[str, Any]]]] = {way: [] for way in ways}
    try:
        with ThreadPoolExecutor(AT_A_TIME) as pool:
            for way in turns:
                answers[way].append(pool.submit(ways[way].run))
        found = {way: [each.result() for each in answered] for way, answered in answers.items()}
    finally:
        for way in ways.values():
            way.close()
    return [_row(w, peer, found[w, "ours"], found[w, peer]) for w in only for peer in peers]


def _row(workload: str, peer: str, ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> Row:
    counts = {answer["tokens"] for answer in (*ours, *theirs)}
    if len(counts) != 1:
        raise SystemExit(f"{workload}: {peer} and ours sampled different numbers of tokens: {counts}")
    said = {name: [round(a["seconds"], 1) for a in of] for name, of in (("ours", ours), (NAMES[peer], theirs))}
    print(f"{workload}: {counts.pop()} tokens, CPU seconds: {said}", flush=True)
    ratios = [other["seconds"] / own["seconds"] for other in theirs for own in ours]
    return row(f"{workload} vs {NAMES[peer]}", ratios, GOALS)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a small model and short sequences: a check, no figures")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=["R1", "R2"])
    parser.add_argument("--continuous", action="store_true", help="transformers' generate_batch too, without a floor")
    args = parser.parse_args()
    found = rows(args.small, args.repeats, tuple(args.only), args.continuous)
    print_head()
    for r in found:
        print_row(r)


if __name__ == "__main__":
    main()
