"""How long a server takes to answer ``/health`` while it is busy, asked from a process of its own."""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from multiprocessing.synchronize import Event
from typing import Any

import httpx

HEALTH_S = 0.2
"""The longest answer that passes, beside the control's."""

WARM_UP_MIB = 256
"""How much more memory the last half of a ``--small`` run may show: caches and heaps are still growing into theirs."""


@contextlib.contextmanager
def watching(url: str) -> Iterator[dict[str, Any]]:
    """Seconds of answers to ``url``, and of the control's, once the block has ended."""
    found: dict[str, Any] = {}
    spawn = multiprocessing.get_context("spawn")
    ended, results = spawn.Event(), spawn.SimpleQueue()
    control = spawn.Process(target=_control, args=(results,))
    control.start()
    watcher = spawn.Process(target=_watch, args=(url, f"http://127.0.0.1:{results.get()}", ended, results))
    watcher.start()
    try:
        yield found
    finally:
        ended.set()
        found.update(results.get())
        watcher.join()
        control.terminate()


def _control(port: Any) -> None:
    """A server that does nothing, in a process of its own; its port goes into the queue."""

    class Nothing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Nothing."""

    server = HTTPServer(("127.0.0.1", 0), Nothing)
    port.put(server.server_address[1])
    server.serve_forever()


def _watch(url: str, control: str, ended: Event, results: Any) -> None:
    answers, controls = [], []
    with httpx.Client(timeout=60) as client:
        while not ended.is_set():
            for place, seconds in ((url, answers), (control, controls)):
                started = time.monotonic()
                client.get(place).raise_for_status()
                seconds.append((time.monotonic() - started, started))
            time.sleep(0.01)
    answers.sort()
    (median, _), (p99, _), (most, at) = answers[len(answers) // 2], answers[len(answers) * 99 // 100], answers[-1]
    seconds = {"median": median, "p99": p99, "most": most, "most_at": at, "control": max(controls)[0]}
    results.put({"asked": len(answers), **{name: round(value, 4) for name, value in seconds.items()}})
