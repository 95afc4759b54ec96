"""``nat evsys serve`` in a forked process, to be killed and started again."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

from forked import Child, nat

LIMIT_S = 120.0


class Server:
    """``nat evsys serve`` on one store and one port, again and again.

    Args:
        place: the store's and the log's directory.
        model: its base model.
        options: further ones of the command.
    """

    def __init__(self, place: Path, model: Path | str, *options: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.key = "tml-load-check-0123456789"
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = place / "server.log"
        self._store = place / "store"
        words = ["--base-model", str(model), "--port", str(self.port), "--store", str(self._store), "--device", "cpu"]
        self._work = nat("evsys", "serve", *words, "--api-key", self.key, *options)
        self._child: Child | None = None

    def start(self) -> None:
        """Start it, and wait until it answers."""
        self._child = Child(self._work, self._log)
        deadline = time.monotonic() + LIMIT_S
        while not self._answers():
            if self._child.wait(0.05) is not None or time.monotonic() > deadline:
                raise SystemExit(f"the server did not start: {tail(self._log)}")

    def kill(self) -> None:
        """kill -9."""
        assert self._child is not None
        self._child.kill()
        self._child.wait(LIMIT_S)

    def stop(self) -> None:
        """Let it park its models and end."""
        assert self._child is not None
        os.kill(self._child.pid, 15)
        if self._child.wait(LIMIT_S) != 0:
            raise SystemExit(f"the server did not end well: {tail(self._log)}")

    def checkpoint(self, path: str) -> Path:
        """Where the store keeps a ``tinker://`` path."""
        return self._store / "checkpoints" / path.removeprefix("tinker://")

    def _answers(self) -> bool:
        import httpx

        try:
            return httpx.get(f"{self.url}/healthz", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False


def tail(path: Path) -> str:
    """The last lines of a log."""
    return path.read_text()[-3000:] if path.exists() else "no log"
