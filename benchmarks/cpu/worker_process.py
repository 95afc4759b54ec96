"""A process that answers a line of JSON with a line of JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


class WorkerProcess:
    """One process that measures one way. It starts at once: several of them load side by side.

    Args:
        script: file beside this one.
        role: which way; the script's first argument, before the others.
    """

    def __init__(self, script: str, role: str, *arguments: str) -> None:
        self.role = role
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / script), role, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._ready = False

    def wait_until_ready(self) -> None:
        """Until it can be asked."""
        if not self._ready:
            self._answer()
            self._ready = True

    def ask(self, request: dict[str, Any] | None) -> dict[str, Any]:
        """The answer to one request."""
        self.wait_until_ready()
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"worker {self.role} ended with {self._process.wait(60)}")
        answer: dict[str, Any] = json.loads(line)
        return answer
