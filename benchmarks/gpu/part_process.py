"""A part of the check in a process of its own: it cannot take the others along, and ends when its time is over."""

from __future__ import annotations

import importlib
import multiprocessing
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection

from findings import Findings
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


_END = {"kind": "end"}
"""The last record: what comes after it, such as taking the device down, may hang and is not waited for."""


def run_part(part: Part, place: Place, left_s: float, each: Callable[[Result], None]) -> Result:
    """Run a part for ``left_s`` seconds at most; ``each`` is called with the result so far after each finding."""
    start, most = time.monotonic(), left_s if place.small else min(part.most_s, left_s)
    result = Result(part.name, ended=f"stopped after {most:.0f} s")
    spawning = multiprocessing.get_context("spawn")
    receiver, sender = spawning.Pipe(duplex=False)
    process = spawning.Process(target=_child, args=(part, place, sender))
    process.start()
    sender.close()
    try:
        while receiver.poll(max(0.0, start + most - time.monotonic())):
            record = receiver.recv()
            result.seconds = time.monotonic() - start
            if record == _END:
                result.ended = ""
                break
            result.findings.append(record)
            each(result)
    except EOFError:
        process.join()
        result.ended = f"ended with exit code {process.exitcode}"
    finally:
        process.kill()
        process.join()
    result.seconds = time.monotonic() - start
    return result


def _child(part: Part, place: Place, sender: Connection) -> None:
    findings = Findings(sender.send)
    with findings.attempt(part.name):
        findings.about(**place.prepare())
        importlib.import_module(part.module).run(findings, place, *part.arguments)
    sys.stdout.flush()
    sender.send(_END)
