"""What all tests share."""

import dataclasses
import os
from pathlib import Path

import pytest

# One thread, so that two workers do not wait for each other's; the processes that tests start get it too, since many
# results are compared bit for bit and the order of a sum depends on it. Set before anything imports torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from nat_plugin_evsys.engine.model import builtin


@pytest.fixture(scope="session")
def short_spec() -> builtin.BuiltinSpec:
    return dataclasses.replace(builtin.SPECS["builtin/tiny"], pretraining_steps=2)


@pytest.fixture(scope="session")
def tiny(short_spec: builtin.BuiltinSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(builtin.SPECS, "builtin/tiny", short_spec)
        return builtin.ensure_builtin("builtin/tiny", tmp_path_factory.mktemp("builtin"))
