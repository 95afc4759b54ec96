"""A part of the check in a process of its own: it cannot take the others along, and ends when its time is over."""

from __future__ import annotations

import importlib
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection

from findings import Findings, Record
from place import Place
from verdict import Result


@dataclass(frozen=True)
class Part:
    """A part of the check.

    Attributes:
        name: as it is printed.
        module: has ``run(findings, place, *arguments)``.
        most_s: seconds that it may take; a rehearsal, on whatever machine, may take what is left.
        arguments: of ``run``.
    """

    name: str
    module: str
    most_s: float
    arguments: tuple[str, ...] = ()


def run_part(part: Part, place: Place, left_s: float, each: Callable[[Result], None]) -> Result:
    """Run a part for ``left_s`` seconds at most; ``each`` is called with the result so far after each finding."""
    result = Result(part.name)
    spawning = multiprocessing.get_context("spawn")
    receiver, sender = spawning.Pipe(duplex=False)
    process = spawning.Process(target=_child, args=(part, place, sender), daemon=True)
    start, most = time.monotonic(), left_s if place.small else min(part.most_s, left_s)
    process.start()
    sender.close()
    while receiver.poll(max(0.0, start + most - time.monotonic())):
        try:
            result.findings.append(receiver.recv())
        except EOFError:
            process.join()
            break
        each(result)
    else:
        process.kill()
        process.join()
        result.ended = f"stopped after {most:.0f} s"
    result.seconds = time.monotonic() - start
    if process.exitcode and not result.ended:
        result.ended = f"ended with exit code {process.exitcode}"
    return result


def _child(part: Part, place: Place, sender: Connection) -> None:
    def send(record: Record) -> None:
        sender.send(record)

    findings = Findings(send)
    with findings.attempt(part.name):
        findings.about(**place.prepare())
        importlib.import_module(part.module).run(findings, place, *part.arguments)
