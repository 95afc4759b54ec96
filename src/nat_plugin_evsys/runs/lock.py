"""A run belongs to one process at a time, which notices when the run is deleted under its feet."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO

from nat_plugin_evsys.errors import RunLostError
from nat_plugin_evsys.files import hold_file


class RunLock:
    """``.lock`` of a run directory, held until ``release`` or the end of the process."""

    NAME = ".lock"

    def __init__(self, directory: Path) -> None:
        self._path = directory / self.NAME
        self._held: IO[str] | None = None

    def hold(self) -> None:
        """Take the run, so that two processes never write to it.

        Raises:
            ConfigError: another process holds it.
        """
        if self._held is None:
            in_use = f"run {self._path.parent} is in use by another process; wait for it to end, or set resume: false"
            self._held = hold_file(self._path, in_use)

    def release(self) -> None:
        """Let another process resume the run."""
        if self._held is not None:
            self._held.close()
            self._held = None

    def is_held(self) -> bool:
        """Whether a process holds the run. Without flock (system or disk) nobody can tell, and the answer is True."""
        if self._held is not None:
            return True
        try:
            import fcntl

            with open(self._path, encoding="utf-8") as handle:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except (ImportError, OSError):
            return True
        return False

    def check(self) -> None:
        """Make sure that the directory is still the one that was taken. Free before ``hold``.

        Raises:
            RunLostError: it was deleted, moved, or replaced by another.
        """
        if self._held is None:
            return
        try:
            here = os.stat(self._path)
        except OSError:
            here = None
        if here is None or not os.path.samestat(here, os.fstat(self._held.fileno())):
            raise RunLostError(
                f"{self._path.parent} was deleted or moved while the run was writing to it, and its checkpoints are "
                "gone with it; start the run again, with finetuning.output_dir where nothing cleans up"
            )
