"""A LocalBackend over a small random Qwen3 model on disk."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from random_datums import byte_datums
from tinker import types
from tiny import save_byte_model

from nat_plugin_evsys.backends.local import LocalBackend


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_byte_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest_asyncio.fixture
async def make_backend(tiny_model: Path, tmp_path: Path) -> AsyncIterator[Callable[..., Any]]:
    """``await make_backend(**options of LocalBackend.create)``; all are closed at the end."""
    made: list[LocalBackend] = []

    async def make(**options: Any) -> LocalBackend:
        options = {"checkpoint_dir": tmp_path / "checkpoints", "rank": 4, "device": "cpu", **options}
        made.append(await LocalBackend.create(str(tiny_model), **options))
        return made[-1]

    yield make
    for backend in made:
        await backend.close()


@pytest.fixture
def make_datums() -> Callable[..., list[types.Datum]]:
    """``make_datums(seed, count, length)`` of cross_entropy Datums."""
    return byte_datums
