"""``builtin/tiny`` with a pretraining of two steps: the tokenizer, the template and the build are the real ones."""

import dataclasses
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from nat_plugin_evsys.engine.model import builtin

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def short_spec() -> builtin.BuiltinSpec:
    return dataclasses.replace(builtin.SPECS["builtin/tiny"], pretraining_steps=2)


@pytest.fixture(scope="session")
def tiny(short_spec: builtin.BuiltinSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(builtin.SPECS, "builtin/tiny", short_spec)
        return builtin.ensure_builtin("builtin/tiny", tmp_path_factory.mktemp("builtin"))


@pytest.fixture(scope="session")
def make_data() -> ModuleType:
    spec = importlib.util.spec_from_file_location("helpdesk_make_data", ROOT / "examples/helpdesk/make_data.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
