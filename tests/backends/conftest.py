"""A LocalBackend over a small random Qwen3 model on disk."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from byte_model import make_model
from tinker import types

from nat_plugin_evsys.backends.local import LocalBackend


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny", 0)


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

    def make(seed: int, count: int = 4, length: int = 12) -> list[types.Datum]:
        rng = random.Random(seed)
        rows = [[rng.randrange(256) for _ in range(length)] for _ in range(count)]
        return [types.Datum(types.ModelInput.from_ints(r[:-1]), {"target_tokens": r[1:]}) for r in rows]

    return make
