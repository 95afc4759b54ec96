"""``nat evsys serve`` as a process of its own."""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

NAT = Path(sys.executable).parent / "nat"
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
        line: what it printed on stdout.
        log: file with its stderr.
    """

    process: subprocess.Popen[str]
    url: str
    line: str
    log: Path
    rest: list[str] = field(default_factory=list)

    def stop(self, number: int = signal.SIGTERM, timeout: float = 40.0) -> int:
        """Send a signal and wait; gives the exit code."""
        if self.process.poll() is None:
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
    command = [
        *(str(NAT), "evsys", "serve"),
        *("--base-model", str(model), "--port", "0", "--store", str(store), "--device", "cpu"),
        *options,
    ]
    settings = {**os.environ, "NAT_TELEMETRY_ENABLED": "false", "HF_HUB_OFFLINE": "1"}
    settings = {**settings, "PYTHONWARNINGS": "ignore", **(env or {})}
    with log.open("a") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=settings)
    lines: queue.Queue[str] = queue.Queue()
    rest: list[str] = []
    threading.Thread(target=_pump, args=(process, lines, rest), daemon=True).start()
    try:
        line = lines.get(timeout=START_SECONDS)
    except queue.Empty:
        process.kill()
        raise AssertionError(f"the server did not start: {log.read_text()[-3000:]}") from None
    found = re.search(r" at (http://\S+)", line)
    if found is None:
        process.kill()
        raise AssertionError(f"the server ended: {line!r}: {log.read_text()[-3000:]}")
    return ServerProcess(process, found[1], line, log, rest)


def _pump(process: subprocess.Popen[str], lines: queue.Queue[str], rest: list[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        rest.append(line)
        lines.put(line)
    lines.put("")
