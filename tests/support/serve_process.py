"""``nat evsys serve`` as a process of its own."""

from __future__ import annotations

import os
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from warm_process import WarmProcess

ALICE = "tml-alice-0123456789abcdef"
BOB = "tml-bob-0123456789abcdefgh"
START_SECONDS = 240.0

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def add_chat_template(model: Path) -> Path:
    """Let the model in this directory chat."""
    (model / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return model


@dataclass
class ServerProcess:
    """A running server.

    Attributes:
        url: where it listens.
        store: its directory.
        out: file with its stdout.
        log: file with its stderr.
    """

    process: WarmProcess
    url: str
    store: Path
    out: Path
    log: Path

    def stop(self, number: int = signal.SIGTERM, timeout: float = 40.0) -> int:
        """Send a signal and wait; gives the exit code."""
        self.process.send_signal(number)
        return self.process.wait(timeout)

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait(20)


def start_server(
    model: Path | str, store: Path, *options: str, log: Path | None = None, env: dict[str, str] | None = None
) -> ServerProcess:
    """Start a server on a free port and wait until it answers requests."""
    store.parent.mkdir(parents=True, exist_ok=True)
    log = log or store.with_suffix(".log")
    out = store.parent / f"{store.name}.out"
    out.unlink(missing_ok=True)
    command = [
        *("evsys", "serve"),
        *("--base-model", str(model), "--port", "0", "--store", str(store), "--device", "cpu"),
        *options,
    ]
    settings = {**os.environ, "NAT_TELEMETRY_ENABLED": "false", "HF_HUB_OFFLINE": "1", **(env or {})}
    process = WarmProcess(command, env=settings, cwd=Path.cwd(), out=out, err=log)
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        ended = process.poll() is not None  # before the file is read, so that nothing printed at the end is missed
        line = out.read_text()
        if found := re.search(r" at (http://\S+).*\n", line):
            return ServerProcess(process, found[1], store, out, log)
        if ended:
            raise AssertionError(f"the server ended: {line!r}: {log.read_text()[-3000:]}")
        time.sleep(0.02)
    process.kill()
    raise AssertionError(f"the server did not start: {log.read_text()[-3000:]}")
