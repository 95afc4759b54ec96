"""The example's script, as a module."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def make_data() -> ModuleType:
    spec = importlib.util.spec_from_file_location("helpdesk_make_data", ROOT / "examples/helpdesk/make_data.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
