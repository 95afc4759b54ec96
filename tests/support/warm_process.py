"""The ``nat`` command in a process that has imported everything before it starts: each start takes seconds less.

Such a process is a fork of multiprocessing's fork server, which imports and computes nothing: no thread runs there, and
torch has made none of its choices yet. What a start does with its surroundings, the fork does.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import TextIO

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["imported_by_nat"])


class WarmProcess:
    """``nat <args>``, its output appended to two files. Each name means what it means in subprocess.Popen."""

    def __init__(self, args: list[str], *, env: dict[str, str], cwd: Path, out: Path, err: Path) -> None:
        out.touch()
        err.touch()
        with _on_the_path(Path(__file__).parent):  # of the fork server, which the first of all processes starts
            self._process = _CONTEXT.Process(target=_nat, args=(args, env, cwd, out, err))
            self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("nat", timeout or 0.0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@contextlib.contextmanager
def _on_the_path(directory: Path) -> Iterator[None]:
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(directory), before]))
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _nat(args: list[str], env: dict[str, str], cwd: Path, out: Path, err: Path) -> None:
    sys.stdin = open(os.devnull)  # noqa: SIM115
    sys.stdout, sys.stderr = _opened(1, out), _opened(2, err)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    _default_signals()
    asyncio.set_event_loop(asyncio.new_event_loop())  # NAT made one when imported, whose epoll all forks would share
    sys.argv = ["nat", *args]
    _search(env.get("PYTHONPATH", ""))
    try:
        (nat,) = entry_points(group="console_scripts", name="nat")
        sys.exit(nat.load()())
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out
        sys.stdout.flush()


def _default_signals() -> None:
    """Whatever the tests were started with: ``nohup`` and a shell's ``&`` leave some ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def _opened(number: int, path: Path) -> TextIO:
    """This file descriptor, and the text file over it, write to ``path`` from now on."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, number)
    os.close(file)
    return open(number, "w", encoding="utf-8", closefd=False, buffering=1)


def _search(path: str) -> None:
    """Look for modules on PYTHONPATH as well, and run a ``sitecustomize`` that is there."""
    added = [directory for directory in path.split(os.pathsep) if directory and directory not in sys.path]
    sys.path[1:1] = added
    if any((Path(directory) / "sitecustomize.py").exists() for directory in added):
        sys.modules.pop("sitecustomize", None)
        importlib.import_module("sitecustomize")
