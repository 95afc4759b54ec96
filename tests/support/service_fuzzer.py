"""Throws malformed, hostile and half-right requests at every endpoint of a running service.

    python tests/support/service_fuzzer.py http://127.0.0.1:8000 --key tml-… --requests 20000 --base-model builtin/tiny

What must hold: no 5xx, no hang, a body with every refusal, and no answer to a wrong key. Prints a JSON summary; the
exit code is 1 when anything of that did not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import struct
import sys
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import zstandard

API = "/api/v1"
TIMEOUT = 60.0
"""Seconds; the longest answer that the protocol allows is a long poll of less than 30."""

JSON_POSTS = (
    "client/config",
    "client/dynamic_config",
    "auth/token",
    "create_session",
    "session_heartbeat",
    "telemetry",
    "create_model",
    "get_info",
    "optim_step",
    "save_weights",
    "save_weights_for_sampler",
    "save_weights_external",
    "load_weights",
    "create_sampling_session",
    "join_sampling_session",
    "asample",
    "retrieve_future",
    "retrieve_futures",
    "cancel_future",
    "create_custom_loss",
    "weights_info",
    "copy_weights",
    "sessions/search",
)
GETS = (
    "get_server_capabilities",
    "healthz",
    "training_runs",
    "training_runs/{id}",
    "training_runs/{id}/checkpoints",
    "training_runs/{id}/checkpoints/{name}/archive",
    "training_runs/{id}/checkpoints/{name}/external_weights_urls",
    "samplers/{id}",
    "checkpoints",
    "sessions",
    "sessions/{id}",
)
OTHERS = (
    ("DELETE", "training_runs/{id}/checkpoints/{name}"),
    ("POST", "training_runs/{id}/checkpoints/{name}/publish"),
    ("DELETE", "training_runs/{id}/checkpoints/{name}/publish"),
    ("PUT", "training_runs/{id}/checkpoints/{name}/ttl"),
    ("POST", "sessions/{id}/finish"),
)
OUTSIDE = (
    ("POST", "/v1/chat/completions"),
    ("GET", "/v1/models"),
    ("POST", "/oai/api/v1/chat/completions"),
    ("GET", "/metrics"),
    ("GET", "/healthz"),
    ("GET", "/external/{name}/{name}"),
    ("GET", "/{name}"),
)
TRICKS = (
    "../../../../etc/passwd",
    "..%2f..%2f..%2fetc%2fpasswd",
    "....//....//etc/passwd",
    "/etc/passwd",
    "weights/../../../escape",
    "tinker://../../weights/x",
    "tinker://a/weights/../../../x",
    "tinker://a/b/c/d/e",
    "file:///etc/passwd",
    "name\x00.txt",
    "con\r\nX-Injected: 1",
    "~root",
    "$(touch escaped)",
    "a" * 5000,
    "\ud7ff\uffff",
    "",
    ".",
    "..",
    "-rf",
    "'; DROP TABLE operations; --",
)


@dataclass
class Findings:
    """What was seen. ``broken`` holds what must not be."""

    sent: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)
    slowest: float = 0.0
    slowest_request: str = ""


@dataclass
class Known:
    """Ids that are real, so that requests get past the first check."""

    session_id: str
    model_id: str
    sampler_id: str
    base_model: str


class Fuzzer:
    """Makes the requests of one seed.

    Args:
        rng: the source of all chance.
        known: real ids to mix in.
        key: a valid key.
    """

    def __init__(self, rng: random.Random, known: Known, key: str) -> None:
        self._rng = rng
        self._known = known
        self._key = key

    def request(self) -> tuple[str, str, dict[str, str], bytes, bool]:
        """``(method, path, headers, body, authorised)`` of the next one."""
        makers: tuple[tuple[int, Callable[[], tuple[str, str, dict[str, str], bytes]]], ...] = (
            (10, self._json),
            (6, self._nearly_right),
            (6, self._protobuf),
            (2, self._compressed),
            (4, self._resource),
            (2, self._outside),
        )
        make = self._rng.choices([m for _, m in makers], [w for w, _ in makers])[0]
        method, path, headers, body = make()
        authorised = self._rng.random() > 0.08
        headers["X-API-Key"] = self._key if authorised else self._wrong_key()
        if path.startswith(("/v1", "/oai")):
            headers["Authorization"] = "Bearer " + headers["X-API-Key"]
        return method, path, headers, body, authorised

    def _wrong_key(self) -> str:
        return self._rng.choice(
            ["", "tml-", "tml-wrong", self._key[:-1], self._key + "x", self._key.upper(), "a" * 8000]
        )

    # -- bodies

    def _json(self) -> tuple[str, str, dict[str, str], bytes]:
        path = f"{API}/{self._rng.choice(JSON_POSTS)}"
        if self._rng.random() < 0.02:
            depth = self._rng.choice([100, 3_000, 100_000])
            body = b"[" * depth + b"]" * depth
        else:
            body = json.dumps(self._value(4)).encode()
        return "POST", path, {"Content-Type": "application/json"}, self._damage(body, 0.3)

    def _nearly_right(self) -> tuple[str, str, dict[str, str], bytes]:
        """A legal request in which one or two fields are not."""
        path, body = self._rng.choice(list(self._legal().items()))
        for key in self._rng.sample(sorted(body), k=min(len(body), self._rng.randint(0, 2))):
            if self._rng.random() < 0.3:
                del body[key]
            else:
                body[key] = self._value(2)
        return "POST", f"{API}/{path}", {"Content-Type": "application/json"}, json.dumps(body).encode()

    def _legal(self) -> dict[str, dict[str, Any]]:
        known, seq = self._known, self._seq()
        adam = {"learning_rate": 1e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-12, "weight_decay": 0.0}
        prompt = {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]}
        return {
            "create_session": {"tags": [], "user_metadata": {}, "sdk_version": "0.38.0", "type": "create_session"},
            "session_heartbeat": {"session_id": known.session_id, "type": "session_heartbeat"},
            "create_model": {
                "session_id": known.session_id,
                "model_seq_id": seq,
                "base_model": known.base_model,
                "lora_config": {"rank": self._value(1), "train_mlp": True, "train_attn": True, "train_unembed": True},
                "type": "create_model",
            },
            "get_info": {"model_id": known.model_id, "type": "get_info"},
            "optim_step": {"model_id": known.model_id, "seq_id": seq, "adam_params": adam, "type": "optim_step"},
            "save_weights": {"model_id": known.model_id, "path": self._name(), "seq_id": seq, "type": "save_weights"},
            "save_weights_for_sampler": {"model_id": known.model_id, "path": self._name(), "seq_id": seq},
            "save_weights_external": {"model_id": known.model_id, "path": self._name(), "seq_id": seq},
            "load_weights": {"model_id": known.model_id, "path": self._name(), "seq_id": seq, "optimizer": True},
            "create_sampling_session": {
                "session_id": known.session_id,
                "sampling_session_seq_id": seq,
                "model_path": self._name(),
                "type": "create_sampling_session",
            },
            "asample": {
                "sampling_session_id": known.sampler_id,
                "seq_id": seq,
                "num_samples": 1,
                "prompt": prompt,
                "sampling_params": {"max_tokens": 2},
                "type": "sample",
            },
            "retrieve_future": {"request_id": self._name(), "allow_metadata_only": False},
            "weights_info": {"tinker_path": self._name()},
        }

    def _protobuf(self) -> tuple[str, str, dict[str, str], bytes]:
        body = self._damage(self._forward_backward(), 0.7)
        headers = {
            "Content-Type": self._rng.choice(["application/x-protobuf"] * 8 + ["application/json", "text/plain"])
        }
        return "POST", f"{API}/forward_backward", headers, body

    def _forward_backward(self) -> bytes:
        """A ForwardBackwardRequest by hand: field numbers of the protocol, contents often wrong."""
        n = self._rng.choice([0, 1, 3, 7])
        tokens = struct.pack(f"<{n}i", *(self._rng.randint(-5, 300) for _ in range(n)))
        chunk = _field(1, _field(1, tokens))
        tensor = _field(1, struct.pack(f"<{n}q", *range(n))) + _varint_field(3, self._rng.randint(0, 6))
        tensor += _varint_field(4, self._rng.choice([n, n, 0, 2**62, n + 1]))
        name = self._rng.choice([b"target_tokens", b"weights", b"logprobs", b"advantages", b"\xff\xfe", b""])
        datum = _field(1, chunk) + _field(2, _field(1, name) + _field(2, tensor))
        loss = self._rng.choice([b"cross_entropy", b"importance_sampling", b"ppo", b"nothing", b""])
        model = self._rng.choice([self._known.model_id, self._name()]).encode("utf-8", "replace")
        return (
            _field(1, model)
            + _varint_field(2, self._seq())
            + _field(3, datum) * self._rng.randint(0, 3)
            + _field(4, loss)
        )

    def _compressed(self) -> tuple[str, str, dict[str, str], bytes]:
        kind = self._rng.random()
        if kind < 0.2:  # 400 MB of zeros in some 40 KB
            body = _bomb()
        elif kind < 0.6:
            body = zstandard.compress(self._forward_backward())
        else:
            body = self._damage(zstandard.compress(self._rng.randbytes(200)), 1.0)
        encoding = self._rng.choice(["zstd", "zstd", "zstd", "gzip", "zstd, zstd", "br"])
        headers = {"Content-Type": "application/x-protobuf", "Content-Encoding": encoding}
        return "POST", f"{API}/{self._rng.choice(['forward_backward', 'asample'])}", headers, body

    def _resource(self) -> tuple[str, str, dict[str, str], bytes]:
        method, path = self._rng.choice([*(("GET", path) for path in GETS), *OTHERS])
        path = path.replace("{id}", _quoted(self._id())).replace("{name}", _quoted(self._name()))
        if self._rng.random() < 0.3:
            path += f"?limit={_quoted(str(self._value(0)))}&offset={_quoted(str(self._value(0)))}"
        if self._rng.random() < 0.05:
            method = self._rng.choice(["PATCH", "OPTIONS", "HEAD", "TRACE"])
        body = json.dumps(self._value(2)).encode() if method in ("POST", "PUT") else b""
        return method, f"{API}/{path}", {"Content-Type": "application/json"}, body

    def _outside(self) -> tuple[str, str, dict[str, str], bytes]:
        method, path = self._rng.choice(OUTSIDE)
        chat = {"model": self._name(), "messages": [{"role": "user", "content": self._value(1)}], "max_tokens": 2}
        if self._rng.random() < 0.5:
            chat["model"] = self._known.base_model
        if self._rng.random() < 0.5:
            chat[self._rng.choice(["stream", "tools", "n", "temperature", "logprobs", "stop"])] = self._value(2)
        body = json.dumps(chat).encode() if method == "POST" else b""
        return method, path.replace("{name}", _quoted(self._name())), {"Content-Type": "application/json"}, body

    # -- values

    def _seq(self) -> int:
        """Half of them are the model's turn some day, the others wait for operations that never come."""
        return self._rng.randint(1, 60) if self._rng.random() < 0.5 else self._rng.randint(500_000, 1_500_000)

    def _id(self) -> str:
        return self._rng.choice([self._known.model_id, self._known.session_id, self._known.sampler_id, self._name()])

    def _name(self) -> str:
        return self._rng.choice(
            [*TRICKS, "fine", f"n{self._rng.randint(0, 9)}", f"tinker://{self._known.model_id}/weights/x"]
        )

    def _value(self, depth: int) -> Any:
        simple: list[Any] = [
            None,
            True,
            0,
            -1,
            1,
            2**31,
            2**63,
            10**400,
            1e308,
            float("nan"),
            float("inf"),
            "",
            "x",
            self._known.model_id,
            self._known.session_id,
            self._rng.choice(TRICKS),
        ]
        if depth <= 0 or self._rng.random() < 0.5:
            return self._rng.choice(simple)
        if self._rng.random() < 0.5:
            return [self._value(depth - 1) for _ in range(self._rng.randint(0, 4))]
        keys = [
            "session_id",
            "model_id",
            "seq_id",
            "path",
            "prompt",
            "type",
            "model_seq_id",
            "base_model",
            "request_id",
        ]
        return {self._rng.choice(keys): self._value(depth - 1) for _ in range(self._rng.randint(0, 5))}

    def _damage(self, body: bytes, likely: float) -> bytes:
        if not body or self._rng.random() > likely:
            return body
        data = bytearray(body)
        for _ in range(self._rng.randint(1, 4)):
            where = self._rng.randrange(len(data)) if data else 0
            what = self._rng.random()
            if what < 0.4 and data:
                data[where] = self._rng.randrange(256)
            elif what < 0.6:
                del data[where:]
            elif what < 0.8:
                data[where:where] = self._rng.randbytes(self._rng.randint(1, 8))
            else:
                data += data[: self._rng.randint(0, 64)]
        return bytes(data)


def _varint(value: int) -> bytes:
    out = bytearray()
    while True:
        byte = value & 0x7F
        value >>= 7
        out.append(byte | (0x80 if value else 0))
        if not value:
            return bytes(out)


def _varint_field(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _field(number: int, value: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(value)) + value


_BOMB: bytes | None = None


def _bomb() -> bytes:
    global _BOMB
    if _BOMB is None:
        packer = zstandard.ZstdCompressor(level=19).compressobj()
        _BOMB = b"".join(packer.compress(bytes(1 << 20)) for _ in range(400)) + packer.flush()
    return _BOMB


def _quoted(text: str) -> str:
    """For a URL; slashes, dots and percent signs stay, as they are half of the tricks."""
    return urllib.parse.quote(text[:2000], safe="/.%:~")


async def set_up(client: httpx.AsyncClient, base_model: str) -> Known:
    """A real session, model and sampler."""

    async def post(path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = await client.post(f"{API}/{path}", json=body)
        answer.raise_for_status()
        found: dict[str, Any] = answer.json()
        return found

    async def future(path: str, body: dict[str, Any]) -> dict[str, Any]:
        request_id = (await post(path, body))["request_id"]
        while True:
            answer = await client.post(f"{API}/retrieve_future", json={"request_id": request_id})
            if answer.status_code != 408:
                answer.raise_for_status()
                found: dict[str, Any] = answer.json()
                return found

    session: dict[str, Any] = {"tags": [], "user_metadata": None, "sdk_version": "0.38.0", "type": "create_session"}
    session_id = (await post("create_session", session))["session_id"]
    lora = {"rank": 4, "seed": 0, "train_mlp": True, "train_attn": True, "train_unembed": False}
    model = {"session_id": session_id, "model_seq_id": 0, "base_model": base_model, "lora_config": lora}
    model_id = (await future("create_model", {**model, "type": "create_model"}))["model_id"]
    sampling = {"session_id": session_id, "sampling_session_seq_id": 0, "base_model": base_model}
    sampler = await post("create_sampling_session", {**sampling, "type": "create_sampling_session"})
    return Known(session_id, model_id, sampler["sampling_session_id"], base_model)


async def fuzz(url: str, key: str, base_model: str, requests: int, seed: int, concurrency: int = 8) -> Findings:
    """Send that many requests; returns what was seen."""
    _bomb()  # making it takes seconds, which must not count as somebody's answer
    findings = Findings()
    limits = httpx.Limits(max_connections=concurrency)
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT, limits=limits, headers={"X-API-Key": key}) as client:
        known = await set_up(client, base_model)
        fuzzers = [Fuzzer(random.Random(f"{seed}/{i}"), known, key) for i in range(concurrency)]

        async def work(fuzzer: Fuzzer) -> None:
            while findings.sent < requests:
                findings.sent += 1
                await _send(client, fuzzer, findings)

        await asyncio.gather(*(work(fuzzer) for fuzzer in fuzzers))
    return findings


async def _send(client: httpx.AsyncClient, fuzzer: Fuzzer, findings: Findings) -> None:
    method, path, headers, body, authorised = fuzzer.request()
    what = f"{method} {path[:120]} {headers.get('Content-Type')} {body[:300]!r}"
    started = time.monotonic()
    try:
        request = client.build_request(method, path, headers=headers, content=body)
        answer = await client.send(request)
    except (httpx.InvalidURL, httpx.LocalProtocolError, ValueError):
        return  # the client itself refuses to send it
    except httpx.TimeoutException:
        findings.broken.append(f"no answer within {TIMEOUT:.0f} s: {what}")
        return
    except httpx.HTTPError as error:
        findings.broken.append(f"the connection broke ({error!r}): {what}")
        return
    if time.monotonic() - started > findings.slowest:
        findings.slowest, findings.slowest_request = time.monotonic() - started, f"{answer.status_code} to {what}"
    findings.statuses[answer.status_code] += 1
    if answer.status_code >= 500:
        findings.broken.append(f"{answer.status_code} {answer.text[:200]!r}: {what}")
    elif answer.status_code >= 400 and not answer.content and method != "HEAD":
        findings.broken.append(f"{answer.status_code} without a body: {what}")
    elif not authorised and answer.status_code < 400 and not path.partition("?")[0].endswith("healthz"):
        findings.broken.append(f"{answer.status_code} for a wrong key: {what}")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--key", required=True)
    parser.add_argument("--base-model", required=True)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    findings = asyncio.run(fuzz(given.url, given.key, given.base_model, given.requests, given.seed))
    summary = {
        "sent": findings.sent,
        "statuses": dict(sorted(findings.statuses.items())),
        "slowest_seconds": round(findings.slowest, 2),
        "broken": findings.broken[:20],
    }
    print(json.dumps(summary, indent=2))
    return 1 if findings.broken else 0


if __name__ == "__main__":
    sys.exit(main())
