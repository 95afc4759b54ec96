"""Rollouts of this package beside Hugging Face's, strictly interleaved, one thread each, R1 beside R2.

    python benchmarks/cpu/rollouts.py [--small] [--repeats N] [--only R1 R2] [--continuous]

Every way runs in a process of its own. In a round they take turns, and this package's runs before and after its peer's;
a ratio is that of CPU seconds, so that a round gives two. The table has the median, the least and the greatest.
"""

from __future__ import annotations

import argparse
import os
import statistics
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from worker_process import WorkerProcess

FLOORS = {"R1": (2.0, 4.0), "R2": (3.0, 6.0)}
NAMES = {"generate": "HF generate", "continuous": "HF generate_batch"}


def compare(workload: str, peer: str, small: bool, repeats: int) -> dict[str, Any]:
    """The row of one workload: ours, peer, ours, in turns."""
    size = "small" if small else "full"
    ours, theirs = (WorkerProcess("rollouts_worker.py", role, size) for role in ("ours", peer))
    ratios: list[float] = []
    try:
        for _ in range(repeats):
            before, other, after = (each.ask(workload=workload) for each in (ours, theirs, ours))
            if not before["tokens"] == other["tokens"] == after["tokens"]:
                raise SystemExit(f"{workload}: {peer} sampled {other['tokens']} tokens, not {before['tokens']}")
            ratios += [other["seconds"] / each["seconds"] for each in (before, after)]
            seconds = f"ours {before['seconds']:.1f} and {after['seconds']:.1f}, {NAMES[peer]} {other['seconds']:.1f}"
            print(f"{workload}: {before['tokens']} tokens, CPU seconds: {seconds}", flush=True)
    finally:
        ours.close()
        theirs.close()
    floor, aim = FLOORS[workload] if peer == "generate" else (None, None)
    return {
        "name": f"{workload} vs {NAMES[peer]}",
        "ratio": statistics.median(ratios),
        "floor": floor,
        "aim": aim,
        "min": min(ratios),
        "max": max(ratios),
    }


def rows(
    small: bool = False, repeats: int = 1, only: tuple[str, ...] = ("R1", "R2"), continuous: bool = False
) -> list[dict[str, Any]]:
    """Rows ``{name, ratio, floor, aim, min, max}``; with ``continuous``, of transformers' continuous batching too."""
    peers = ["generate", "continuous"] if continuous else ["generate"]
    pairs = [(workload, peer) for workload in only for peer in peers]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:  # CPU seconds of one thread each
        return list(pool.map(lambda pair: compare(*pair, small, repeats), pairs))


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a small model and short sequences: a check, no figures")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=["R1", "R2"])
    parser.add_argument("--continuous", action="store_true", help="transformers' generate_batch too, without a floor")
    args = parser.parse_args()
    for r in rows(args.small, args.repeats, tuple(args.only), args.continuous):
        cells = [f"{r[k]:7.2f}" if r[k] is not None else "      -" for k in ("ratio", "floor", "aim", "min", "max")]
        print(f"{r['name']:48s} {' '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
