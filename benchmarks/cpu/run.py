"""All CPU benchmarks: training steps, rollouts, and both, beside peers. Prints a table, writes benchmarks/out/cpu.json.

python benchmarks/cpu/run.py [--small] [--only W1 … Q] [--repeats N] [--extra] [--threads N] [--clock cpu]
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import quickstart
import rollouts
import train
from table import Row, print_head, print_row, write

ROLLOUTS = ("R1", "R2")
QUICKSTART = "Q"


def main() -> None:
    """Measure, print the table, write the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a small model and short sequences: a check, no figures")
    parser.add_argument("--only", nargs="*", default=[*train.WORKLOADS, *ROLLOUTS, QUICKSTART])
    parser.add_argument("--repeats", type=int, default=1, help="steps of each peer")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: for a machine that is not idle")
    parser.add_argument("--extra", action="store_true", help="also the rows without a floor")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "out" / "cpu.json")
    args = parser.parse_args()
    if args.clock == "cpu" and args.threads != 1:
        parser.error("--clock cpu counts what waiting threads spin, too: give --threads 1")
    options = train.Options("small" if args.small else "full", args.repeats, args.threads, args.clock, args.extra)
    rows: list[Row] = train.rows([name for name in args.only if name in train.WORKLOADS], options)
    # These count CPU seconds of one thread, whatever the clock.
    rows += rollouts.rows(args.small, args.repeats, tuple(name for name in args.only if name in ROLLOUTS))
    if QUICKSTART in args.only:
        rows += quickstart.rows(args.small, args.repeats)
    print_head()
    for r in rows:
        print_row(r)
    write(args.out, rows, size=options.size, threads=options.threads, clock=options.clock)


if __name__ == "__main__":
    main()
