"""Servers in processes of their own, over a tiny model on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from serve_process import ALICE, BOB, ServerProcess, add_chat_template, start_server
from tiny import save_byte_model
from wire_client import Wire


@pytest.fixture(scope="session")
def served_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 of 260 tokens that can chat."""
    return add_chat_template(save_byte_model(tmp_path_factory.mktemp("served") / "models" / "tiny"))


@pytest.fixture(scope="session")
def open_server(served_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server without keys."""
    server = start_server(served_model, tmp_path_factory.mktemp("open") / "store", "--poll-seconds", "3")
    yield server
    server.stop()


@pytest.fixture(scope="session")
def keyed_server(served_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with two keys and a JSON log; bodies are bounded at 64 KiB as sent."""
    root = tmp_path_factory.mktemp("keyed")
    (root / "keys").write_text(f"# one a line\n{ALICE}\n")
    server = start_server(
        served_model,
        root / "store",
        *("--api-key-file", str(root / "keys"), "--log-format", "json", "--poll-seconds", "1"),
        env={"EVSYS_API_KEYS": BOB},
    )
    yield server
    server.stop()


@pytest.fixture
def start(served_model: Path, tmp_path: Path) -> Iterator[Callable[..., ServerProcess]]:
    """``start(*options)``: a server on this test's own store; ended with the test."""
    servers: list[ServerProcess] = []

    def starter(*options: str, **settings: Any) -> ServerProcess:
        servers.append(start_server(served_model, tmp_path / "store", *options, **settings))
        return servers[-1]

    yield starter
    for server in servers:
        if server.process.poll() is None:
            server.kill()


@pytest.fixture
def wire() -> Callable[..., Wire]:
    """``wire(url, key)``: a client."""
    return Wire
