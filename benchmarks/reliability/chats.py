"""Many clients of the policy endpoint at once, some of which leave, and some of which never read.

    python benchmarks/reliability/chats.py [--small] [--rounds N]

20 streams are opened and not read, to the end. Then, round after round, 64 chats of two turns run at once, beside 20
streams whose clients leave after the first event. Passes if every chat is answered, the second turns' prompts extend
the first ones', ``/health`` never takes longer than 5 s (and what this process itself came late, as the machine may be
busy), and the memory of the endpoint's process after each round is flat within 5 % over the last half of the rounds.

The prefix cache, which fills its 2 GiB in the course of a day, is bounded at 64 MiB here, so that the bound is reached.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import socket
import sys
import time
from multiprocessing.connection import Connection
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil

CHATS, CUT, UNREAD = 64, 20, 20
FLAT, HEALTH_S = 0.05, 5.0
MIB = 1 << 20
MODEL = "builtin/tiny"
LONG: dict[str, Any] = {"model": MODEL, "stream": True, "temperature": 5.0, "max_tokens": 1000, "logprobs": True}


def main() -> int:
    """Run the rounds and print what was seen."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--rounds", type=int, default=24)
    arguments.add_argument("--small", action="store_true", help="12 rounds")
    options = arguments.parse_args()
    here, there = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    child = context.Process(target=_serve, args=(there,), daemon=True)
    child.start()
    url, key = here.recv()
    summary = asyncio.run(_rounds(url, key, 12 if options.small else options.rounds, psutil.Process(child.pid)))
    here.send("totals")
    summary |= here.recv()
    child.kill()
    summary["wrong"] = _wrong(summary)
    print(json.dumps(summary, indent=1))
    return 1 if summary["wrong"] else 0


def _serve(pipe: Connection) -> None:
    """The endpoint of a policy, as `nat serve` has it."""
    from nat_plugin_evsys.config.policy import EvsysPolicyConfig
    from nat_plugin_evsys.engine import sampler
    from nat_plugin_evsys.policy.policy import Policy

    sampler._PREFIX_BYTES = 64 * MIB
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
    memory, extended, second_turns, slowest, started = [], 0, 0, 0.0, time.monotonic()
    late = _Late()
    watch = asyncio.create_task(late.watch())
    async with httpx.AsyncClient(
        base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=600, limits=limits
    ) as client:
        for number in range(rounds):
            work = asyncio.gather(
                *(_chat(client, f"{number}-{index}") for index in range(CHATS)),
                *(_cut(client, f"{number}-{index}") for index in range(CUT)),
            )
            while not work.done():
                before = time.monotonic()
                (await client.get(url.removesuffix("/v1") + "/health")).raise_for_status()
                slowest = max(slowest, time.monotonic() - before)
                await asyncio.wait({work}, timeout=0.2)
            answers = [answer for answer in await work if answer is not None]
            second_turns, extended = second_turns + len(answers), extended + sum(answers)
            memory.append(round(process.memory_info().rss / MIB, 1))
    watch.cancel()
    for connection in unread:
        connection.close()
    return {
        "rounds": rounds, "chats": rounds * CHATS, "cut": rounds * CUT, "unread": UNREAD,
        "second_turns": second_turns, "extended": extended, "slowest_health_s": round(slowest, 3),
        "late_s": round(late.seconds, 3),
        "memory_mib": memory, "threads": process.num_threads(), "descriptors": process.num_fds(),
        "seconds": round(time.monotonic() - started, 1),
    }  # fmt: skip


class _Late:
    """How much later than asked this process's event loop came back, at most."""

    seconds = 0.0

    async def watch(self) -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.05)
            self.seconds = max(self.seconds, time.monotonic() - before - 0.05)


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


def _wrong(summary: dict[str, Any]) -> list[str]:
    wrong = []
    half = summary["memory_mib"][len(summary["memory_mib"]) // 2 :]
    if max(half) > min(half) * (1 + FLAT):
        wrong.append(f"memory went from {min(half)} to {max(half)} MiB over the last half")
    if summary["slowest_health_s"] > HEALTH_S + summary["late_s"]:
        wrong.append(f"/health took {summary['slowest_health_s']} s")
    if summary["extended"] < summary["second_turns"]:
        wrong.append(f"{summary['second_turns'] - summary['extended']} second turns do not extend the first")
    if summary["failures"]:
        wrong.append(f"{summary['failures']} calls failed")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
