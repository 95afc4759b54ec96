"""The parts of the GPU check, one after the other, while the time lasts: a verdict a part, and ``$OUT/gpu.json``.

    benchmarks/gpu/check.sh [--only exactness …] [--seconds 470] [--device cpu --small]

The file is written anew after each finding. The exit code is 1 where numbers are wrong, where a part broke, or where
exactness was not shown in time; what is slow or was left out for want of time is said, and is no error. A rehearsal
must get through all parts.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from part_process import Part, run_part
from place import Place
from verdict import Result, exit_code

from nat_plugin_evsys.files import atomic_write
from nat_plugin_evsys.json_lines import to_json

PARTS = (
    Part("exactness", "exactness", 200),
    Part("speed 4B", "speed", 150, ("4B",)),
    Part("speed 0.6B", "speed", 90, ("0.6B",)),
    Part("learning", "learning", 60),
    Part("memory", "memory_peak", 40),
    Part("judge", "judge", 40),
    Part("time split", "time_split", 40),
)
MUST_FINISH = ("exactness",)
LEAST_S = 15.0
"""Loading torch and transformers takes most of it: with less left, a part is not begun."""


class Check:
    """The results so far, and the file that has them."""

    def __init__(self, place: Place, seconds: float, command: str) -> None:
        self._place = place
        self._end = time.monotonic() + seconds
        self._about = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": command,
            "size": "small" if place.small else "full",
            "seconds": seconds,
        }
        self.results: list[Result] = []

    def run(self, part: Part) -> None:
        """One part, or nothing of it where too little time is left; prints its verdict."""
        left = self._end - time.monotonic()
        print(f"{part.name}:", flush=True)
        if left < LEAST_S:
            result = Result(part.name, ended=f"{max(0.0, left):.0f} s were left")
        else:
            result = run_part(part, self._place, left, lambda so_far: self._write([*self.results, so_far]))
        self.results.append(result)
        self._write(self.results)
        print(result.line(), flush=True)

    def _write(self, results: Sequence[Result]) -> None:
        found = {**self._about, "parts": [result.as_json() for result in results]}
        atomic_write(self._place.out / "gpu.json", to_json(found, indent=2) + "\n")


def main() -> int:
    """Run the check; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="a rehearsal: tiny models, whose times mean nothing")
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS], help="some parts")
    parser.add_argument("--seconds", type=float, default=470.0, help="for everything")
    args = parser.parse_args()
    if args.device == "cpu" and not args.small:
        parser.error("--device cpu is a rehearsal: give --small, too")
    out = Path(os.environ.get("OUT") or Path(__file__).parents[1] / "out")
    out.mkdir(parents=True, exist_ok=True)
    check = Check(Place(args.device, args.small, out), args.seconds, " ".join(["check.sh", *sys.argv[1:]]))
    parts = [part for part in PARTS if args.only is None or part.name in args.only]
    for part in parts:
        check.run(part)
    print("\n".join(["", *(result.line() for result in check.results)]), flush=True)
    return exit_code(check.results, [part.name for part in parts if args.small or part.name in MUST_FINISH])


if __name__ == "__main__":
    sys.exit(main())
