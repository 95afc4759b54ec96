"""What all tests share."""

import os
from pathlib import Path

import pytest

# One thread, so that two workers do not wait for each other's; the processes that tests start get it too, since many
# results are compared bit for bit and the order of a sum depends on it. Set before anything imports torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from nat_plugin_evsys.engine.model import builtin
from nat_plugin_evsys.engine.model.builtin_tiny import TinyRecipe


@pytest.fixture(scope="session")
def short_recipe() -> TinyRecipe:
    return TinyRecipe(pretraining_steps=2)


@pytest.fixture(scope="session")
def tiny(short_recipe: TinyRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(builtin.RECIPES, "builtin/tiny", short_recipe)
        return builtin.ensure_builtin("builtin/tiny", tmp_path_factory.mktemp("builtin"))
