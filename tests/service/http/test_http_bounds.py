"""What is too large, malformed, unknown or not offered: a 4xx with a body that says so."""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
from typing import Any

import httpx
import pytest
import zstandard
from serve_process import ServerProcess

from nat_plugin_evsys.errors import Refusal
from nat_plugin_evsys.service.proto import tinker_wire_pb2
from nat_plugin_evsys.web.bodies import decompress
from nat_plugin_evsys.web.json_bodies import parse_json

PROTOBUF = {"content-type": "application/x-protobuf"}
BIG = 2**70


def refused(answer: httpx.Response, status: int, said: str) -> None:
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert body["category"] == "user"
    assert said in body["error"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[1]", "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"session_id": "\\ud800"}', "not JSON"),
        (b'{"session_id": NaN}', "NaN is not a JSON number"),
        (b'{"session_id": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"session_id": 3}', "`session_id`"),
        (b"{}", "`session_id`"),
    ],
)
def test_bodies_that_are_no_request_are_400(open_server: ServerProcess, body: bytes, said: str) -> None:
    refused(httpx.post(f"{open_server.url}/api/v1/create_model", content=body), 400, said)


@pytest.mark.parametrize("seq_id", [-1, 0, BIG, 1.5, "1", None, True])
def test_sequence_numbers_are_checked(open_server: ServerProcess, seq_id: Any) -> None:
    body = {"model_id": "x:train:0", "seq_id": seq_id, "adam_params": {}}
    answer = httpx.post(f"{open_server.url}/api/v1/optim_step", json=body)
    refused(answer, 400, "seq_id")


@pytest.mark.parametrize("samples", [0, -1, 4097, BIG])
def test_num_samples_is_bounded(open_server: ServerProcess, samples: int) -> None:
    body = {"sampling_session_id": "x:sample:0", "seq_id": 1, "num_samples": samples}
    refused(httpx.post(f"{open_server.url}/api/v1/asample", json=body), 400, "num_samples")


def test_forward_backward_takes_protobuf_only(open_server: ServerProcess) -> None:
    url = f"{open_server.url}/api/v1/forward_backward"
    refused(httpx.post(url, json={}), 415, "application/x-protobuf")
    refused(httpx.post(url, content=b"\x0a\xff", headers=PROTOBUF), 400, "cut off")
    refused(httpx.post(url, content=b"", headers=PROTOBUF), 400, "seq_id")
    message = tinker_wire_pb2.ForwardBackwardRequest(model_id="nobody:train:0", seq_id=1).SerializeToString()
    refused(httpx.post(url, content=message, headers=PROTOBUF), 404, "no model")
    packed = {**PROTOBUF, "content-encoding": "zstd"}
    refused(httpx.post(url, content=zstandard.compress(message), headers=packed), 404, "no model")
    refused(httpx.post(url, content=message, headers=packed), 400, "not zstd")
    refused(httpx.post(url, content=message, headers={**PROTOBUF, "content-encoding": "br"}), 415, "Content-Encoding")


def test_a_zstd_bomb_is_not_unpacked(open_server: ServerProcess) -> None:
    out = io.BytesIO()
    with zstandard.ZstdCompressor(level=1).stream_writer(out, closefd=False) as writer:
        for _ in range(512):
            writer.write(b"\0" * (1 << 20))
    assert len(out.getvalue()) < 1 << 20
    headers = {**PROTOBUF, "content-encoding": "zstd"}
    answer = httpx.post(
        f"{open_server.url}/api/v1/forward_backward", content=out.getvalue(), headers=headers, timeout=60
    )
    refused(answer, 413, "decompressed body has more than")


def test_a_body_beyond_the_bound_is_not_read(open_server: ServerProcess) -> None:
    url = httpx.URL(open_server.url)
    head = f"POST /api/v1/telemetry HTTP/1.1\r\nHost: {url.host}\r\nContent-Length: {1 << 40}\r\n\r\n"
    with socket.create_connection((url.host, url.port or 80), timeout=10) as connection:
        connection.sendall(head.encode() + b"{}")
        answer = connection.recv(65536)
    assert answer.startswith(b"HTTP/1.1 413 ")
    with socket.create_connection((url.host, url.port or 80), timeout=30) as connection:
        connection.sendall(head.replace(f"Content-Length: {1 << 40}", "Transfer-Encoding: chunked").encode())
        piece = b"100000\r\n" + b" " * (1 << 20) + b"\r\n"
        with contextlib.suppress(OSError):  # the server stops listening to it
            for _ in range(80):
                connection.sendall(piece)
        answer = connection.recv(65536)
    assert answer.startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize("listing", ["training_runs", "sessions"])
@pytest.mark.parametrize(
    "query", ["limit=-1", "limit=x", "limit=0", "offset=-3", "limit=" + "9" * 30, "access_scope=x"]
)
def test_pages_are_checked(open_server: ServerProcess, listing: str, query: str) -> None:
    assert httpx.get(f"{open_server.url}/api/v1/{listing}?{query}").status_code == 400
    assert httpx.get(f"{open_server.url}/api/v1/{listing}?limit=20&offset=0&access_scope=accessible").status_code == 200


def test_runs_of_a_project_are_refused(open_server: ServerProcess) -> None:
    refused(httpx.get(f"{open_server.url}/api/v1/training_runs?project_id=x"), 400, "project_id is not offered")
    refused(httpx.get(f"{open_server.url}/api/v1/sessions/x?access_scope=x"), 400, "owned or accessible")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "auth/token"),
        ("POST", "create_custom_loss"),
        ("POST", "retrieve_futures"),
        ("POST", "copy_weights"),
        ("POST", "sessions/search"),
        ("PUT", "sessions/x/project"),
        ("GET", "sessions/x/trace_export"),
        ("GET", "audit"),
        ("GET", "billing/usage/events"),
    ],
)
def test_what_is_not_offered_says_so(open_server: ServerProcess, method: str, path: str) -> None:
    refused(httpx.request(method, f"{open_server.url}/api/v1/{path}"), 404, "is not offered by this server: ")


def test_unknown_paths_and_methods_have_a_body(open_server: ServerProcess) -> None:
    refused(httpx.get(f"{open_server.url}/nowhere"), 404, "GET /nowhere is not served here")
    refused(httpx.get(f"{open_server.url}/api/v1/create_model"), 405, "is not served here")
    refused(httpx.get(f"{open_server.url}/api/v1/sessions/"), 404, "is not served here")


@pytest.mark.parametrize("name", ["..", ".", "%2e%2e", "..%2f..%2fx", "%00", "a%2f..%2fb", "x" * 5000, "%ff"])
@pytest.mark.parametrize("kind", ["weights", "..", "sampler_weights", "etc"])
def test_checkpoint_names_cannot_leave_their_directory(open_server: ServerProcess, kind: str, name: str) -> None:
    for method, end in (("DELETE", ""), ("PUT", "/ttl"), ("POST", "/publish"), ("GET", "/external_weights_urls")):
        url = f"{open_server.url}/api/v1/training_runs/{name}/checkpoints/{kind}/{name}{end}"
        answer = httpx.request(method, url, json={"ttl_seconds": 3600})
        assert answer.status_code in (400, 404, 405), (answer.status_code, answer.text)
        assert answer.json()["error"]


@pytest.mark.parametrize("seconds", [3599, 0, -1, 1e9, "3600", True, BIG])
def test_a_ttl_is_an_hour_to_ten_years(open_server: ServerProcess, seconds: Any) -> None:
    url = f"{open_server.url}/api/v1/training_runs/x/checkpoints/weights/y/ttl"
    refused(httpx.put(url, json={"ttl_seconds": seconds}), 400, "ttl_seconds")


def test_decompress_takes_several_frames_and_stops_at_its_bound() -> None:
    one = zstandard.compress(b"abc" * 100)
    assert decompress(one + one, 600) == b"abc" * 200
    with pytest.raises(Refusal, match="more than 599 bytes"):
        decompress(one + one, 599)


def test_an_empty_body_is_an_empty_object() -> None:
    assert parse_json(b"") == {}
    assert parse_json(json.dumps({"a": "\U0001f600"}).encode()) == {"a": "\U0001f600"}


@pytest.mark.parametrize("options", [{}, {"write_content_size": False}, {"write_checksum": True}])
def test_decompress_refuses_a_body_that_is_cut_off(options: dict[str, bool]) -> None:
    content = os.urandom(200_000) + bytes(300_000)
    parts = zstandard.ZstdCompressor(**options).compressobj()
    one = parts.compress(content[:250_000]) + parts.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    one += parts.compress(content[250_000:]) + parts.flush()
    skippable = b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc"
    assert decompress(one + skippable + one, 1 << 20) == content * 2
    for cut in (1, 2, 3, 4, 5, 17, 100_000, len(one) - 20, len(one) - 5, len(one) - 1):
        for before in (b"", one):
            with pytest.raises(Refusal, match="cut off"):
                decompress(before + one[:-cut], 1 << 20)
    with pytest.raises(Refusal, match="cut off"):
        decompress(one + skippable[:-1], 1 << 20)
    assert decompress(b"", 1 << 20) == b""


def test_decompress_refuses_a_body_of_blocks_without_content() -> None:
    header = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    empty = header.compress(b"") + header.flush()
    assert decompress(empty, 10) == b""
    with pytest.raises(Refusal, match="blocks"):
        decompress(empty[:-3] + bytes(3) * 200_000 + empty[-3:], 10)
