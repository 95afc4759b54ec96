"""What the programs run against: ``nat evsys serve`` on the toy model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from serve_process import ServerProcess, start_server

from nat_plugin_evsys.engine.model.builtin import ensure_builtin


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``builtin/tiny`` as a directory: ART's side has to find its tokenizer."""
    return Path(ensure_builtin("builtin/tiny", tmp_path_factory.mktemp("models")))


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    process = start_server(model, tmp_path_factory.mktemp("service") / "store")
    yield process
    process.stop()
