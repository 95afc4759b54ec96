"""Hostile requests against ``nat evsys serve`` while somebody asks ``/healthz``, from a process of its own.

    python benchmarks/reliability/hostile.py [--small] [--requests N] [--seed S]

Three kinds, in turn: structure-aware HTTP requests (tests/support/service_fuzzer.py: half-right JSON and protobuf,
bombs, tricks with paths and keys), JSON bombs of several shapes and sizes on every route that takes JSON, and raw
sockets (floods of headers, malformed heads and chunks, connections that say half and wait).

Passes if no answer is a 5xx and none takes more than 2 s, ``/healthz`` never takes more than 0.2 s, and the server's
memory, threads and descriptors are flat over the last half. To both times the longest answer of another server is
added, a trivial one that nobody attacks, because the machine may be busy.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import socket
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import psutil
import zstandard
from health import HEALTH_S, WARM_UP_MIB, watching

SUPPORT = Path(__file__).resolve().parents[2] / "tests" / "support"
sys.path.insert(0, str(SUPPORT))

from raw_http import answer, connect, send  # noqa: E402
from serve_process import ALICE, ServerProcess, start_server  # noqa: E402
from service_fuzzer import fuzz  # noqa: E402

MIB = 1 << 20
ANSWER_S = 2.0
ROUTES = ("create_session", "create_model", "optim_step", "asample", "retrieve_future", "chat")
ITEMS = (b"[]", b"{}", b"1", b'""', b'{"role":"user","content":"x"}', b"[[[[]]]]", b"1e5", b"null", b'"\\u0000"')
ROUND = 200
"""Fuzzed requests between two rounds of bombs and raw sockets."""

NOW: list[tuple[float, str]] = []
"""When each attack began."""


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--requests", type=int, default=50_000)
    arguments.add_argument("--small", action="store_true", help="1,000 requests")
    arguments.add_argument("--seed", type=int, default=0)
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory(prefix="evsys-hostile-") as place:
        requests, growth = (1_000, WARM_UP_MIB) if options.small else (options.requests, 64)
        summary = attack(Path(place), requests, options.seed, growth)
    print(json.dumps(summary, indent=1))
    return 1 if summary["wrong"] else 0


def attack(place: Path, requests: int, seed: int, growth: int) -> dict[str, Any]:
    """Start a server and attack it; what is wrong is in ``wrong``. ``growth``: MiB that the last half may add."""
    from serve_process import add_chat_template
    from tiny import save_byte_model

    model = add_chat_template(save_byte_model(place / "model"))
    server = start_server(model, place / "store", "--api-key", ALICE, "--poll-seconds", "1")
    process, dice = psutil.Process(server.process.pid), random.Random(seed)
    statuses, wrong, readings, sent, slowest = Counter[str](), list[str](), list[dict[str, int]](), 0, Counter[str]()
    try:
        with watching(f"{server.url}/healthz") as health:
            while sent < requests:
                NOW.append((time.monotonic(), "fuzz"))
                found = asyncio.run(fuzz(server.url, ALICE, str(model), ROUND, seed + sent))
                statuses.update({str(status): count for status, count in found.statuses.items()})
                wrong += found.broken
                kind = f"fuzz: {found.slowest_request[:150]}"
                slowest[kind] = max(slowest[kind], found.slowest)
                sent += found.sent
                for attacker in (bomb, raw):
                    for _ in range(ROUND // 20):
                        said, seconds = attacker(server, dice)
                        kind = NOW[-1][1].partition(" of ")[0]
                        slowest[kind] = max(slowest[kind], seconds)
                        statuses[said] += 1
                        wrong += [f"{attacker.__name__}: {said}"] if said.startswith("5") else []
                        sent += 1
                with process.oneshot():
                    reading = {"mib": process.memory_info().rss // MIB, "threads": process.num_threads()}
                readings.append({**reading, "descriptors": process.num_fds()})
            waiting = hold_open(server)
        if server.stop() != 0:
            wrong.append("the server did not end well")
    finally:
        server.kill()
    wrong += judge(health, readings, waiting, growth)
    at = max((each for each in NOW if each[0] <= health["most_at"]), default=(0.0, "nothing"))
    health["most_during"] = at[1]
    wrong += [f"{kind}: {s:.2f} s" for kind, s in slowest.items() if s > ANSWER_S + health["control"]]
    facts = {
        "sent": sent,
        "statuses": dict(statuses),
        "slowest": {k: round(s, 2) for k, s in slowest.most_common(5)},
        "healthz": health,
    }
    return {**facts, "first": readings[0], "middle": readings[len(readings) // 2], "last": readings[-1], "wrong": wrong}


def bomb(server: ServerProcess, dice: random.Random) -> tuple[str, float]:
    """Many small JSON values, plain or compressed, to a route that takes JSON; status and seconds of the answer."""
    item, size = dice.choice(ITEMS), dice.choice([1, 4, 16, 64]) * MIB
    body = b'{"messages": [' + (item + b",") * (size // (len(item) + 1)) + item + b"]}"
    headers = {"x-api-key": ALICE, "authorization": f"Bearer {ALICE}"}
    if size > 16 * MIB or dice.random() < 0.5:
        body, headers["content-encoding"] = zstandard.compress(body), "zstd"
    route = dice.choice(ROUTES)
    url = f"{server.url}/v1/chat/completions" if route == "chat" else f"{server.url}/api/v1/{route}"
    started = time.monotonic()
    NOW.append((started, f"bomb {route} {size >> 20} MiB of {item!r} {headers.get('content-encoding', 'plain')}"))
    try:
        status = str(httpx.post(url, content=body, headers=headers, timeout=60).status_code)
    except httpx.TransportError:  # refused by its length, before the body was sent
        status = "closed"
    return status, time.monotonic() - started


def raw(server: ServerProcess, dice: random.Random) -> tuple[str, float]:
    """What no HTTP library would send; status and seconds of the answer, or of its silence."""
    line = dice.choice(
        [b"GET /healthz HTTP/1.1\r\n", b"POST /api/v1/create_session HTTP/1.1\r\n", b"GET / HTTP/9.9\r\n"]
    )
    shapes = {
        "flood": line + b"Host: x\r\n" + b"".join(b"x-%d: %s\r\n" % (n, b"v" * 1000) for n in range(5_000)),
        "many": line + b"Host: x\r\n" + b"a: b\r\n" * 101 + b"\r\n",
        "long line": b"GET /" + b"a" * (2 * MIB) + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        "no host": line + b"\r\n",
        "two lengths": line + b"Host: x\r\nContent-Length: 3\r\nContent-Length: 5\r\n\r\nabcde",
        "smuggled": line + b"Host: x\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "bad chunk": line + b"Host: x\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\nabc\r\n",
        "chunk flood": line + b"Host: x\r\nTransfer-Encoding: chunked\r\n\r\n1;" + b"e" * (2 * MIB),
        "negative": line + b"Host: x\r\nContent-Length: -1\r\n\r\n",
        "bare cr": line + b"Host: x\rX: y\r\n\r\n",
        "null": line + b"Host: \x00\r\n\r\n",
        "noise": dice.randbytes(dice.randint(1, 5_000)),
        "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + dice.randbytes(500),
    }
    shape, started = dice.choice(sorted(shapes)), time.monotonic()
    NOW.append((started, f"raw {shape}"))
    with connect(server.url, timeout=1.5) as connection:
        send(connection, shapes[shape])
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_WR)
        try:
            said = answer(connection)
        except TimeoutError:
            return "waits", time.monotonic() - started
    status = said[9:12].decode("ascii", "replace") if said.startswith(b"HTTP/1.1 ") else "closed"
    return status, time.monotonic() - started


def hold_open(server: ServerProcess, count: int = 220, seconds: float = 45.0) -> int:
    """Connections that say half a head and wait: how many of them the server keeps after ``seconds``."""
    held = [connect(server.url) for _ in range(count)]
    for connection in held:
        send(connection, b"GET /healthz HTTP/1.1\r\nHost: x\r\nx-half: ")
    time.sleep(seconds)
    kept = 0
    for connection in held:
        connection.settimeout(0.01)
        try:
            answer(connection)
        except TimeoutError:
            kept += 1
        connection.close()
    return kept


def judge(health: dict[str, Any], readings: list[dict[str, int]], waiting: int, growth: int) -> list[str]:
    """What the measurements have against the server."""
    found = []
    if health["most"] > HEALTH_S + health["control"]:
        found.append(f"healthz took {health['most']} s, and the control {health['control']} s")
    half = readings[len(readings) // 2 :]
    for name, slack in (("mib", growth), ("threads", 2), ("descriptors", 8)):
        if half[-1][name] > half[0][name] + slack:
            found.append(f"{name} grew from {half[0][name]} to {half[-1][name]} over the last half")
    if waiting:
        found.append(f"{waiting} half-open connections were kept")
    return found


if __name__ == "__main__":
    sys.exit(main())
