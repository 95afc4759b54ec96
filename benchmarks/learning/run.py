"""Curves of this engine beside TRL's and a plain loop's at equal rollouts: python benchmarks/learning/run.py [--small]

Each run is a process of its own, of one thread; what it gives is kept under ``results/`` and not run again. At the end
the table and the plot of RESULTS.md are written from all that is there.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from curve import EPOCHS, Curve
from tasks import NAMES, task

HERE = Path(__file__).parent
RESULTS = HERE / "results"
SIDES = ("ours", "trl", "plain")
RATES = (2e-4, 5e-4, 1e-3, 2e-3)
RATE = 5e-4
"""At which all sides and tasks are compared; the default."""
SWEPT = ("helpdesk", "chain_sum")
"""Tasks on which the learning rates are compared."""

SEEDS = (0, 1, 2)
MORE_SEEDS, NEAR_RATES = range(3, 8), RATES[1:]
"""Where runs differ by luck (on the help desk by 0.4): both sides at 5e-4, and this engine at the rates above it."""

SMALL_EPOCHS, SMALL_TASKS = 2, ("helpdesk", "price_list")

Case = tuple[str, str, float, int]
"""Side, task, learning rate, seed."""


def cases() -> list[Case]:
    """Every run of the comparison, those of the first seed first."""
    compared = [
        (side, name, rate, seed)
        for seed in SEEDS
        for name in NAMES
        for rate in (RATES if name in SWEPT else (RATE,))
        for side in (SIDES if rate == RATE else SIDES[:2])
    ]
    more = [(side, name, RATE) for name in SWEPT for side in SIDES[:2]]
    more += [("ours", "helpdesk", rate) for rate in NEAR_RATES if rate != RATE]
    return compared + [(*each, seed) for seed in MORE_SEEDS for each in more]


def path_of(case: Case, directory: Path) -> Path:
    """Where a case's curve is kept."""
    side, name, rate, seed = case
    return directory / f"{name}-{side}-{rate:g}-{seed}.json"


def run(case: Case, epochs: int, directory: Path) -> None:
    """Run one case in this process, and keep its curve."""
    import ours
    import plain_loop
    import trl_side

    side, name, rate, seed = case
    runner = {"ours": ours.run, "trl": trl_side.run, "plain": plain_loop.run}[side]
    with tempfile.TemporaryDirectory() as work:
        points = runner(task(name), rate, seed, Path(work), epochs)
    directory.mkdir(parents=True, exist_ok=True)
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_seconds = time.process_time() + children.ru_utime + children.ru_stime
    Curve(side, name, rate, seed, points, round(cpu_seconds, 1)).write(path_of(case, directory))


def main() -> None:
    """Run what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="one seed, one rate, two epochs, two tasks: ten minutes")
    parser.add_argument("--tasks", nargs="*", default=NAMES, choices=NAMES)
    parser.add_argument("--sides", nargs="*", default=SIDES, choices=SIDES)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after this many")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    epochs, directory = (SMALL_EPOCHS, HERE.parent / "out" / "learning") if options.small else (EPOCHS, RESULTS)
    if options.case:
        side, name, rate, seed = json.loads(options.case)
        run((side, name, rate, seed), epochs, directory)
        return
    wanted = [case for case in cases() if case[1] in options.tasks and case[0] in options.sides]
    if options.small:
        wanted = [case for case in wanted if case[1] in SMALL_TASKS and case[2:] == (RATE, 0)]
    started = time.monotonic()
    for case in wanted:
        if path_of(case, directory).exists() or time.monotonic() - started > options.minutes * 60:
            continue
        begun = time.monotonic()
        command = [sys.executable, "-W", "ignore", __file__, "--case", json.dumps(case), *["--small"] * options.small]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
        done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL)
        what = "ok" if done.returncode == 0 else f"failed, exit code {done.returncode}"
        print(f"{path_of(case, directory).stem}: {what}, {time.monotonic() - begun:.0f} s", flush=True)
    from table import write

    write([Curve.read(path) for path in sorted(directory.glob("*.json"))], directory.parent if options.small else HERE)


if __name__ == "__main__":
    main()
