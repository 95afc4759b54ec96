"""The examples' scripts, as modules, and an endpoint that their agents talk to."""

import importlib.util
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from openai_listener import Listener

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="session")
def load_script() -> Callable[[str], ModuleType]:
    """``load_script("helpdesk/make_data.py")``: a script of the examples, which is in no package."""

    def load(name: str) -> ModuleType:
        module_name = name.removesuffix(".py").replace("/", "_")
        spec = importlib.util.spec_from_file_location(module_name, EXAMPLES / name)
        assert spec
        assert spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def make_data(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("helpdesk/make_data.py")


@pytest.fixture
def listener() -> Iterator[Listener]:
    server = Listener()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()
