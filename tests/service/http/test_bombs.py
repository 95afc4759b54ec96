"""Small requests that would become large: refused, in little time and memory, while everybody else is answered."""

from __future__ import annotations

import re
import resource
from pathlib import Path

import httpx
import pytest
import zstandard
from raw_http import answer, connect, send, watching
from serve_process import ServerProcess

MIB = 1 << 20
SLOWEST = 5.0
"""Seconds for an answer beside a bomb, on a machine that runs other tests too; without bounds it is minutes."""

JSON = ("create_session", "create_model", "optim_step", "asample", "retrieve_future", "chat")


def place(server: ServerProcess, name: str) -> str:
    return f"{server.url}/v1/chat/completions" if name == "chat" else f"{server.url}/api/v1/{name}"


def peak(server: ServerProcess) -> int:
    """Bytes: the most memory that the server has used."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) << 10


def hurl(server: ServerProcess, name: str, body: bytes, **headers: str) -> httpx.Response:
    """Send it, and see that nobody else has waited and little memory was used."""
    before = peak(server)
    with watching(f"{server.url}/healthz") as watch:
        answered = httpx.post(place(server, name), content=body, headers=headers, timeout=120)
    print(f"{name}: {answered.status_code}, healthz at most {watch.slowest:.3f} s, {(peak(server) - before) >> 20} MiB")
    assert watch.slowest < SLOWEST
    assert peak(server) - before < 400 * MIB
    return answered


@pytest.mark.parametrize("name", JSON)
def test_a_compressed_bomb(open_server: ServerProcess, name: str) -> None:
    bomb = zstandard.compress(b'{"a": [' + b"[]," * (39 * MIB) + b"[]]}")
    assert len(bomb) < 64 << 10
    answered = hurl(open_server, name, bomb, **{"content-encoding": "zstd"})
    assert answered.status_code == 413
    assert "decompressed body has more than" in answered.text


@pytest.mark.parametrize("size", [MIB, 4 * MIB, 16 * MIB])
@pytest.mark.parametrize("name", JSON)
@pytest.mark.parametrize(
    "item",
    [b"[]", b"{}", b"1", b'""', b'"":1', b'{"role":"user","content":"x"}'],
    ids=["arrays", "objects", "numbers", "strings", "members", "messages"],
)
def test_a_plain_bomb(open_server: ServerProcess, name: str, size: int, item: bytes) -> None:
    opening, closing = (b"{", b"}") if b'":' in item[:4] else (b'{"messages": [', b"]}")
    body = opening + item + (b"," + item) * (size // (len(item) + 1)) + closing
    answered = hurl(open_server, name, body[: size - 2] if len(body) < size else body)
    assert answered.status_code in (400, 413)


def test_a_prompt_of_a_million_texts_is_refused_by_its_first(open_server: ServerProcess) -> None:
    tokens = ",".join(['"x"'] * 900_000)
    body = f'{{"sampling_session_id": "s", "seq_id": 1, "prompt": {{"chunks": [{{"tokens": [{tokens}]}}]}}}}'
    assert hurl(open_server, "asample", body.encode()).status_code == 404


@pytest.mark.parametrize("piece", [b"\x1a\x00", b"\x1a\x02\x0a\x00"], ids=["datums", "chunks"])
def test_a_protobuf_bomb(open_server: ServerProcess, piece: bytes) -> None:
    bomb = zstandard.compress(b"\x0a\x01m\x10\x01" + piece * (100 * MIB // len(piece)))
    kind = {"content-type": "application/x-protobuf", "content-encoding": "zstd"}
    answered = hurl(open_server, "forward_backward", bomb, **kind)
    assert answered.status_code == 400
    assert "Datums" in answered.text


def resident(server: ServerProcess) -> int:
    """Bytes of memory that the server uses now."""
    return int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]) * resource.getpagesize()


def test_refused_bodies_leave_nothing_behind(open_server: ServerProcess) -> None:
    pack = zstandard.ZstdCompressor().compressobj()
    bomb = b"".join(pack.compress(bytes(MIB)) for _ in range(200)) + pack.flush()
    kind = {"content-type": "application/x-protobuf", "content-encoding": "zstd"}
    before = resident(open_server)
    for _ in range(8):
        assert httpx.post(place(open_server, "forward_backward"), content=bomb, headers=kind, timeout=120).is_error
    print(f"{(resident(open_server) - before) >> 20} MiB")
    assert resident(open_server) - before < 300 * MIB  # one body of 128 MiB, the most that is taken apart


def test_a_header_flood_without_a_key(keyed_server: ServerProcess) -> None:
    before = peak(keyed_server)
    flood = b"".join(b"x-%d: %s\r\n" % (number, b"v" * 1000) for number in range(100_000))
    with watching(f"{keyed_server.url}/healthz") as watch, connect(keyed_server.url) as connection:
        taken = send(connection, b"GET /healthz HTTP/1.1\r\nHost: x\r\n" + flood)
        said = answer(connection)
    print(f"{said[:40]!r}, {taken >> 10} KiB of {len(flood) >> 10} taken, healthz at most {watch.slowest:.3f} s")
    assert taken < 16 * MIB
    assert watch.slowest < SLOWEST
    assert peak(keyed_server) - before < 32 * MIB
