"""What the sources import is what pyproject.toml declares, and constraints.txt pins it."""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import files, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
_EXTRAS = ("art", "peft", "ray", "tensorboard", "wandb", "mlflow")
EXTRAS = [each for name in _EXTRAS for each in PROJECT["optional-dependencies"][name]]
RUNTIME = [*PROJECT["dependencies"], *EXTRAS]
DEV = PROJECT["optional-dependencies"]["dev"]

NOT_IMPORTED = {
    "httptools": "uvicorn's parser of that name, which web/bounded_protocol.py stands on",
    "nvidia-nat-langchain": "the agents of the shipped configs: tool_calling_agent and react_agent are its components",
    "nvidia-nat-profiler": "NAT's evaluation, which makes the rollouts, fails without it",
    "tensorboard": "torch.utils.tensorboard writes with it",
}
"""What a run needs though no file of src imports it."""

NOT_INSTALLED = {
    "art": "openpipe-art",
    "mlflow": "mlflow-skinny",
    "ray": "ray",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
}
"""Distributions of modules that are imported only where the extra is installed, which it need not be here."""

FRAMEWORKS = (
    "agno",
    "autogen_core",
    "autogen_ext",
    "crewai",
    "google.adk",
    "llama_index",
    "semantic_kernel",
    "strands",
)
"""Brought by the workflows that are made of them; policy/frameworks.py imports one when it is asked for its client."""


def names(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(requirement).name) for requirement in requirements}


def imported_modules(tree: ast.AST) -> Iterator[str]:
    """Absolute names, also of imports within functions; ``a.b`` and ``a.b.c`` for ``from a.b import c``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


distributions_of = cache(packages_distributions)


@cache
def modules_of(distribution: str) -> set[str]:
    paths = [Path(file) for file in files(distribution) or [] if file.suffix == ".py"]
    return {".".join((path.parent if path.stem == "__init__" else path.with_suffix("")).parts) for path in paths}


def distribution_of(module: str) -> str:
    """The distribution that a module comes from; of a namespace that several share, the one that has the module."""
    parts = module.split(".")
    found = distributions_of().get(parts[0]) or [NOT_INSTALLED.get(parts[0], f"{parts[0]} (not installed)")]
    if len(set(found)) > 1:
        prefixes = {".".join(parts[:length]) for length in range(2, len(parts) + 1)}
        found = [name for name in found if prefixes & modules_of(name)]
    return canonicalize_name(found[0])


def imported_distributions(folder: Path) -> dict[str, str]:
    """Distribution -> one of the files that import it."""
    support = {path.stem for path in (ROOT / "tests" / "support").glob("*.py")}
    examples = {path.name for path in ROOT.glob("examples/*/src/*") if (path / "__init__.py").is_file()}
    benchmarks = {path.stem for path in ROOT.glob("benchmarks/*/*.py")}
    own = {"nat_plugin_evsys"} | support | examples | benchmarks
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*.py")):
        for module in imported_modules(ast.parse(path.read_text())):
            top = module.partition(".")[0]
            if f"{module}.".startswith(tuple(f"{framework}." for framework in FRAMEWORKS)):
                continue
            if top not in sys.stdlib_module_names and top not in own:
                found.setdefault(distribution_of(module), str(path.relative_to(ROOT)))
    return found


@pytest.mark.parametrize(
    ("folder", "declared"), [("src", names(RUNTIME)), ("tests", names(RUNTIME) | names(DEV))], ids=["src", "tests"]
)
def test_what_is_imported_is_declared(folder: str, declared: set[str]) -> None:
    undeclared = {name: path for name, path in imported_distributions(ROOT / folder).items() if name not in declared}
    assert undeclared == {}


def test_what_is_declared_is_imported() -> None:
    assert names(RUNTIME) - imported_distributions(ROOT / "src").keys() == NOT_IMPORTED.keys()


def test_constraints_pin_every_direct_dependency_and_name_no_path() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = [Requirement(line) for line in lines]
    assert [str(pin) for pin in pins] == lines
    assert all(len(pin.specifier) == 1 and str(pin.specifier).startswith("==") and not pin.url for pin in pins)
    versions = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}
    for wanted in map(Requirement, [*PROJECT["dependencies"], *DEV]):
        assert wanted.specifier.contains(versions[canonicalize_name(wanted.name)]), wanted
