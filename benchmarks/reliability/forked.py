"""``nat`` in forked processes: what takes ten seconds to import is imported once, so that hundreds of runs are cheap.

Each child is a process of its own with the command's own arguments, output and exit code, and may be killed.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn


def preload() -> None:
    """Import what the commands import, and start no thread: threads do not survive a fork."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["NAT_TELEMETRY_ENABLED"] = "false"
    import nat.cli.main
    import nat.plugins.eval.runtime.evaluate  # noqa: F401
    import torch
    from nat.runtime.loader import PluginTypes, discover_and_register_plugins

    import nat_plugin_evsys.backends.local
    import nat_plugin_evsys.finetuning.trainer
    import nat_plugin_evsys.report.page
    import nat_plugin_evsys.service.http.server
    import nat_plugin_evsys.training.group_material  # noqa: F401

    torch.set_num_threads(1)
    discover_and_register_plugins(PluginTypes.CONFIG_OBJECT)


class Child:
    """A forked process."""

    def __init__(self, work: Callable[[], object], log: Path) -> None:
        """``work`` runs in the child, which exits with what it exits with; its output is appended to ``log``."""
        sys.stdout.flush()
        sys.stderr.flush()
        self.code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            _run(work, log)

    def wait(self, seconds: float) -> int | None:
        """The exit code (negative for a signal), or None if it still runs after this time."""
        deadline = time.monotonic() + seconds
        while self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                return None
            else:
                time.sleep(0.005)
        return self.code

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to the process and its children."""
        if self.code is None:
            os.killpg(self.pid, number)


def nat(*arguments: str) -> Callable[[], object]:
    """The work of ``nat <arguments>``."""

    def work() -> object:
        from nat.cli.main import run_cli

        sys.argv = ["nat", *arguments]
        return run_cli()

    return work


def _run(work: Callable[[], object], log: Path) -> NoReturn:
    code = 1
    atexit._clear()  # what the parent wants done at its end, such as deleting its temporary directory
    try:
        os.setsid()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(output, 1)
        os.dup2(output, 2)
        work()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - the child's last words
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
