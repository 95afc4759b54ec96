"""What a client may send before a route sees it has an end, in bytes and in time."""

from __future__ import annotations

import json
import time

import httpx
import pytest
from raw_http import answer, closes_within, connect, send, watching

from nat_plugin_evsys.web import bounded_protocol
from nat_plugin_evsys.web.bounded_protocol import MAX_HEAD_BYTES, MAX_HEADERS

HEAD = b"POST /read HTTP/1.1\r\nHost: x\r\n"


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a second for the head of a request, one for its body."""
    monkeypatch.setattr(bounded_protocol, "HEAD_SECONDS", 0.5)
    monkeypatch.setattr(bounded_protocol, "BODY_SECONDS", 1.0)


def headers(count: int, size: int = 8) -> bytes:
    return b"".join(b"x-%d: %s\r\n" % (number, b"v" * size) for number in range(count))


def test_a_hundred_headers_are_taken_and_one_more_is_431(url: str) -> None:
    for count, status in ((MAX_HEADERS - 2, b"200"), (MAX_HEADERS - 1, b"431"), (10_000, b"431")):
        with connect(url) as connection:
            send(connection, b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + headers(count) + b"\r\n")
            assert answer(connection).split(b" ")[1] == status


def test_a_flood_of_headers_is_not_taken(url: str) -> None:
    for flood in (b"x: " + b"y" * (64 << 20), headers(1 << 20, 40), b"y" * (64 << 20)):
        with connect(url) as connection:
            taken = send(connection, HEAD + flood)
            said = answer(connection)
        assert taken < 16 << 20  # the sockets' buffers hold some of it
        assert said == b"" or said.split(b" ")[1] in (b"431", b"400")


@pytest.mark.parametrize(
    "flood",
    [
        b"1;" + b"e" * (8 << 20),  # the extension of a chunk
        b"2\r\n{}\r\n0\r\n" + headers(1 << 18, 40),  # trailers
        b"2\r\n{}\r\n0\r\nx: " + b"y" * (8 << 20),
    ],
    ids=["extension", "trailers", "trailer"],
)
def test_what_is_between_the_pieces_of_a_body_is_bounded_too(url: str, flood: bytes) -> None:
    with connect(url) as connection:
        send(connection, HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        assert send(connection, flood) < len(flood)
        answer(connection)


def test_a_head_just_below_the_bound_is_taken_in_small_pieces(url: str) -> None:
    head = b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    filler = headers(60, (MAX_HEAD_BYTES - 2000) // 60)
    with connect(url) as connection:
        send(connection, head + filler + b"\r\n", pieces=5000)
        assert answer(connection).startswith(b"HTTP/1.1 200 ")


HALVES = {
    "nothing": b"",
    "half a request line": b"POST /re",
    "half a head": HEAD + b"x-a: b\r\n",
    "an empty line": b"\r\n",
    "no body": HEAD + b"Content-Length: 5\r\n\r\n",
    "half a body": HEAD + b"Content-Length: 5\r\n\r\n{}",
    "half a chunk": HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{}",
    "a body that nobody reads": b"GET /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n{}",
    "the second half": b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\nGET /heal",
}


@pytest.mark.parametrize("half", HALVES)
def test_half_open_connections_do_not_stay(url: str, hurried: None, half: str) -> None:
    with connect(url) as connection:
        send(connection, HALVES[half])
        started = time.monotonic()
        assert closes_within(connection, 20)
        assert time.monotonic() - started > 0.4


def test_empty_lines_do_not_keep_an_idle_connection(url: str, hurried: None) -> None:
    with connect(url) as connection:
        send(connection, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
        send(connection, b"\r\n")
        assert closes_within(connection, 20)


def test_a_trickle_does_not_buy_time(url: str, hurried: None) -> None:
    with connect(url) as connection:
        connection.sendall(HEAD)
        started = time.monotonic()
        while send(connection, b"x: y\r\n") and time.monotonic() - started < 20:
            time.sleep(0.05)
        assert time.monotonic() - started < 10


def test_a_slow_request_is_told_408(url: str, hurried: None) -> None:
    for half in (b"POST /read HTTP/1.1\r\n", HEAD + b"Content-Length: 5\r\n\r\n{}"):
        with connect(url) as connection:
            send(connection, half)
            assert answer(connection).startswith(b"HTTP/1.1 408 ")


def test_openais_routes_are_told_in_openais_error_object(url: str, hurried: None) -> None:
    said = {}
    for path in ("/v1/chat/completions", "/oai/api/v1/chat/completions", "/rollouts/a/v1/models", "/api/v1/optim_step"):
        with connect(url) as connection:
            send(connection, f"POST {path} HTTP/1.1\r\nHost: x\r\n".encode())
            said[path] = json.loads(answer(connection).split(b"\r\n\r\n", 1)[1])
    assert said.pop("/api/v1/optim_step") == {"error": "Request Timeout", "category": "user"}
    for body in said.values():
        assert (body["error"]["type"], body["error"]["code"]) == ("invalid_request_error", "request_timeout")
        assert "its body" in body["error"]["message"]


def test_a_long_answer_is_not_cut(url: str, hurried: None) -> None:
    assert httpx.get(f"{url}/held", timeout=30).json() == {"held": True}


def test_many_half_open_connections_leave_room_for_others(url: str, hurried: None) -> None:
    held = [connect(url) for _ in range(220)]
    try:
        for connection in held:
            connection.sendall(HEAD)
        assert httpx.get(f"{url}/healthz", timeout=10).status_code == 200
        time.sleep(1.5)
        assert all(closes_within(connection, 10) for connection in held)
    finally:
        for connection in held:
            connection.close()


def test_pipelined_requests_are_answered_in_order(url: str) -> None:
    one = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
    with connect(url) as connection:
        send(connection, one * 50 + one.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        assert answer(connection).count(b"HTTP/1.1 200 ") == 51


def test_keep_alive_goes_on_after_a_body(url: str) -> None:
    with httpx.Client(base_url=url) as client:
        for size in (2, 300_000, 2, 900_000):
            body = b"{" + b" " * (size - 2) + b"}"
            assert client.post("/read", content=body).json() == {"bytes": size}


def test_a_body_sent_in_many_small_chunks_does_not_hold_up_the_others(url: str) -> None:
    body = HEAD + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\n \r\n" * 150_000 + b"0\r\n\r\n"
    with connect(url) as connection, watching(f"{url}/healthz") as watch:
        send(connection, body)
        assert answer(connection).startswith(b"HTTP/1.1 400 ")  # blanks are no JSON
    assert watch.slowest < 5
