"""Many clients of the policy endpoint at once, some of which leave, and some of which never read.

    python benchmarks/reliability/chats.py [--small] [--rounds N] [--serve]

20 streams are opened and not read, to the end. Then, round after round, 64 chats of two turns run at once, beside 20
streams whose clients leave after the first event. Passes if every chat is answered, the second turns' prompts extend
the first ones', ``/health`` never takes longer than 0.2 s (and the answer of a server that does nothing, as the machine
may be busy), and the memory of the server's process after each round is flat within 5 % over the last half of the
rounds. With ``--serve`` the server is `nat evsys serve`.

The prefix cache, which fills its 2 GiB in the course of a day, is bounded at 64 MiB here, so that the bound is reached.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
from health import HEALTH_S, WARM_UP_MIB, watching

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "support"))

from serve_process import ALICE, start_server

CHATS, CUT, UNREAD = 64, 20, 20
FLAT = 0.05
MIB = 1 << 20
MODEL = "builtin/tiny"
LONG: dict[str, Any] = {"model": MODEL, "stream": True, "temperature": 5.0, "max_tokens": 1000, "logprobs": True}


def main() -> int:
    """Run the rounds and print what was seen."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--rounds", type=int, default=24)
    arguments.add_argument("--small", action="store_true", help="12 rounds")
    arguments.add_argument("--serve", action="store_true", help="`nat evsys serve` instead of the policy's endpoint")
    options = arguments.parse_args()
    with (_nat_serve if options.serve else _endpoint)() as (url, key, process, totals):
        started = time.monotonic()
        with watching(f"{url.removesuffix('/v1')}/{'healthz' if options.serve else 'health'}") as health:
            summary = asyncio.run(_rounds(url, key, 12 if options.small else options.rounds, process))
        health["most_at"] = round(health["most_at"] - started, 1)
        summary |= {"health": health, **totals()}
    summary["wrong"] = _wrong(summary, options.small)
    print(json.dumps(summary, indent=1))
    return 1 if summary["wrong"] else 0


Server = tuple[str, str, psutil.Process, Callable[[], dict[str, Any]]]
"""The URL, a key, the process, and what it counted in the end."""


@contextmanager
def _endpoint() -> Iterator[Server]:
    """The policy endpoint of a process."""
    here, there = multiprocessing.Pipe()
    child = multiprocessing.get_context("spawn").Process(target=_serve, args=(there,), daemon=True)
    child.start()
    url, key = here.recv()

    def totals() -> dict[str, Any]:
        here.send("totals")
        counts: dict[str, Any] = here.recv()
        return counts

    yield url, key, psutil.Process(child.pid), totals
    child.kill()


@contextmanager
def _nat_serve() -> Iterator[Server]:
    """`nat evsys serve`."""
    with tempfile.TemporaryDirectory(prefix="evsys-chats-") as place:
        server = start_server(MODEL, Path(place) / "store", "--api-key", ALICE)
        yield f"{server.url}/v1", ALICE, psutil.Process(server.process.pid), dict
        server.kill()


def _serve(pipe: Connection) -> None:
    """The endpoint of a policy, as `nat serve` has it."""
    from nat_plugin_evsys.config.policy import EvsysPolicyConfig
    from nat_plugin_evsys.engine.sampling import budgets
    from nat_plugin_evsys.policy.policy import Policy

    budgets._PREFIX_BYTES = 64 * MIB
    policy = Policy.of(EvsysPolicyConfig(base_model=MODEL, checkpoint="none", max_tokens=24))
    asyncio.run(policy.ensure_loaded())
    pipe.send((policy.endpoint.base_url, policy.endpoint.api_key))
    pipe.recv()
    totals = policy.recorder.totals
    pipe.send({"answered": totals.answered, "failures": totals.failures, "disconnected": totals.disconnected})
    pipe.recv()


async def _rounds(url: str, key: str, rounds: int, process: psutil.Process) -> dict[str, Any]:
    unread = [_unread(url, key) for _ in range(UNREAD)]
    limits = httpx.Limits(max_connections=None)
    memory, extended, second_turns, started = [], 0, 0, time.monotonic()
    async with httpx.AsyncClient(
        base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=600, limits=limits
    ) as client:
        for number in range(rounds):
            work = asyncio.gather(
                *(_chat(client, f"{number}-{index}") for index in range(CHATS)),
                *(_cut(client, f"{number}-{index}") for index in range(CUT)),
            )
            answers = [answer for answer in await work if answer is not None]
            second_turns, extended = second_turns + len(answers), extended + sum(answers)
            memory.append(round(process.memory_info().rss / MIB, 1))
    for connection in unread:
        connection.close()
    return {
        "rounds": rounds, "chats": rounds * CHATS, "cut": rounds * CUT, "unread": UNREAD,
        "second_turns": second_turns, "extended": extended,
        "memory_mib": memory, "threads": process.num_threads(), "descriptors": process.num_fds(),
        "seconds": round(time.monotonic() - started, 1),
    }  # fmt: skip


async def _chat(client: httpx.AsyncClient, name: str) -> bool:
    """Two turns; whether the second prompt starts with all ids of the first."""
    body: dict[str, Any] = {"model": MODEL, "temperature": 1.0, "return_token_ids": True}
    messages: list[dict[str, Any]] = [{"role": "user", "content": f"My printer {name} does not work."}]
    first = await _post(client, {**body, "messages": messages})
    messages += [first["choices"][0]["message"], {"role": "user", "content": "And now?"}]
    second = await _post(client, {**body, "messages": messages})
    known = first["prompt_token_ids"] + first["choices"][0]["token_ids"]
    return bool(second["prompt_token_ids"][: len(known)] == known)


async def _post(client: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
    answer = await client.post("/chat/completions", json=body)
    answer.raise_for_status()
    data: dict[str, Any] = answer.json()
    return data


async def _cut(client: httpx.AsyncClient, name: str) -> None:
    """A stream that its client leaves after the first event."""
    body = {**LONG, "messages": [{"role": "user", "content": f"Tell me all about {name}."}]}
    async with client.stream("POST", "/chat/completions", json=body) as stream:
        stream.raise_for_status()
        async for _ in stream.aiter_lines():
            return


def _unread(url: str, key: str) -> socket.socket:
    """A stream of four long replies that nobody reads."""
    parts = urlsplit(url)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    connection.connect((parts.hostname, parts.port))
    body = json.dumps({**LONG, "n": 4, "messages": [{"role": "user", "content": "Go on."}]}).encode()
    head = f"POST {parts.path}/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return connection


def _wrong(summary: dict[str, Any], small: bool) -> list[str]:
    wrong = []
    half = summary["memory_mib"][len(summary["memory_mib"]) // 2 :]
    if max(half) > min(half) + (WARM_UP_MIB if small else FLAT * min(half)):
        wrong.append(f"memory went from {min(half)} to {max(half)} MiB over the last half")
    health = summary["health"]
    if health["most"] > HEALTH_S + health["control"]:
        wrong.append(f"/health took {health['most']} s, and the control {health['control']} s")
    if "answered" in summary and summary["extended"] < summary["second_turns"]:  # only a policy keeps recorded ids
        wrong.append(f"{summary['second_turns'] - summary['extended']} second turns do not extend the first")
    if summary.get("failures"):
        wrong.append(f"{summary['failures']} calls failed")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
