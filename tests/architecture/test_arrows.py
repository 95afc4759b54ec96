"""Imports point one way: the table of the rooms (docs/architecture.md), held against the imports in the source.

Every import counts: those inside functions, which only put off the loading, and those under ``TYPE_CHECKING``, since a
type is knowledge of another room too.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "nat_plugin_evsys"
SOURCE = ROOT / "src" / PACKAGE
MOST_MODULES = 25

GROUND = {
    "errors",
    "address_space",
    "files",
    "garbage",
    "inbox",
    "json_lines",
    "loop_thread",
    "call_images",
    "defaults",
    "loss_config",
}
ENGINE = {"engine/machine", "engine/model", "engine/tree", "engine/gradient", "engine/sampling", "engine/spans"}
DRIVERS = ENGINE | {"engine/checkpoints", "engine/checkpoint_loading", "engine/sampler"}

ARROWS: dict[str, set[str]] = {
    # What every room may stand on. ``defaults`` is runtime/defaults.py, which config reads: constants alone.
    "errors": set(),
    "defaults": set(),
    "loss_config": {"errors", "defaults"},
    "files": {"errors"},
    "address_space": {"errors"},
    "garbage": {"errors"},
    "inbox": set(),
    "cells": set(),
    "overlapping": set(),
    "loop_thread": {"errors"},
    "json_lines": {"errors", "files"},
    "call_images": {"errors"},
    "calls": {"errors", "call_images"},
    "config": {"errors", "defaults", "loss_config"},
    # The engine, from the machine up to a request and a step.
    "engine/machine": GROUND,
    "engine/model": GROUND | {"engine/machine"},
    "engine/tree": GROUND | {"engine/machine", "engine/model"},
    "engine/gradient": GROUND | {"engine/machine", "engine/model", "engine/tree"},
    "engine/sampling": GROUND | {"calls", "engine/machine", "engine/model"},
    "engine/spans": GROUND | {"engine/machine", "engine/model", "engine/sampling", "engine/tree"},
    "engine/checkpoints": GROUND | {"engine/model", "engine/gradient"},
    "engine/checkpoint_loading": GROUND | {"engine/model", "engine/gradient", "engine/checkpoints"},
    "engine/sampler": GROUND | {"engine/machine", "engine/model", "engine/sampling", "engine/spans"},
    # Its drivers.
    "runtime": GROUND | DRIVERS,
    "replicas": GROUND | DRIVERS | {"runtime"},
    "clients": GROUND | DRIVERS | {"runtime"},
    "backends": GROUND | DRIVERS | {"runtime", "replicas", "config", "calls"},
    # Rollouts and training, without and with an engine.
    "rollouts": GROUND | {"calls"},
    "training": GROUND | {"calls", "rollouts", "backends"},
    # NAT's side.
    "web": GROUND | {"config"},
    "policy": GROUND | {"calls", "config", "backends", "runs", "web"},
    "runs": GROUND,
    "report": GROUND | {"calls", "overlapping", "runs", "rollouts"},
    "evaluators": GROUND | {"cells", "config"},
    "finetuning": GROUND
    | {"calls", "cells", "config", "backends", "overlapping", "policy", "report", "rollouts", "runs", "training"},
    "register": {"config", "evaluators", "finetuning", "policy", "errors"},
    # The engine over HTTP.
    "service/proto": set(),
    "service/wire": GROUND | {"runtime", "service/proto", *DRIVERS},
    "service/store": GROUND | {"runtime", "service/wire"},
    "service/work": GROUND | DRIVERS | {"runtime", "replicas", "service/wire", "service/store"},
    "service/http": GROUND
    | DRIVERS
    | {"calls", "config", "policy", "replicas", "runtime", "web", "service/store", "service/wire", "service/work"},
    # What people call.
    "types": {"clients", "runtime", *DRIVERS},
    "art": GROUND | {"config", "finetuning", "policy", "rollouts"},
    "testing": GROUND | {"calls", "backends", "policy"},
    "cli": GROUND | {"config", "report", "runs", "rollouts", "runtime", "service/http"} | DRIVERS,
    "": {"clients", "types", "policy"},
}

STANDARD_LIBRARY_ONLY = sorted(GROUND | {"calls"})
NO_NAT = (
    *DRIVERS,
    "runtime",
    "replicas",
    "clients",
    "backends",
    "service/wire",
    "service/store",
    "service/work",
    "types",
)
ONLY = {"config": {"pydantic", "nat"}}
"""Rooms that may use these third-party packages and no others, so that reading a config stays fast."""
NOTHING_HEAVY = ("config", "register", "runs", "cli")
HEAVY = {"torch", "transformers", "peft", "art", "tinker", "matplotlib", "ray"}


def room(path: Path) -> str:
    """``engine/tree`` for a module of a wing, ``engine/sampler`` for one beside the wings, else its top folder."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    if parts == ("runtime", "defaults"):
        return "defaults"
    if parts == ("__init__",):
        return ""
    if parts[0] in ("engine", "service") and parts[1] != "__init__":
        return "/".join(parts[:2])
    return parts[0]


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        name = ".".join((PACKAGE, *path.relative_to(SOURCE).with_suffix("").parts))
        found[name.removesuffix(".__init__")] = path
    return found


def imported(path: Path) -> Iterator[str]:
    """The dotted names that a module imports: of the package to the module, of others to the top-level package."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in modules() else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def own(path: Path) -> set[str]:
    return {name for name in imported(path) if name in modules()}


def foreign(path: Path) -> set[str]:
    tops = {name.split(".")[0] for name in imported(path)}
    return tops - set(sys.stdlib_module_names) - {PACKAGE}


def test_every_room_is_in_the_table() -> None:
    rooms = {room(path) for path in modules().values()} - {"engine", "service"}
    assert not rooms - set(ARROWS), f"rooms without a row: {sorted(rooms - set(ARROWS))}"
    assert not set(ARROWS) - rooms, f"rows without a room: {sorted(set(ARROWS) - rooms)}"


@pytest.mark.parametrize("name", sorted(ARROWS))
def test_a_room_imports_what_the_table_allows(name: str) -> None:
    wrong = [
        f"{module} imports {other}, and {name or 'the package'} may not import {room(modules()[other])}"
        for module, path in modules().items()
        if room(path) == name
        for other in sorted(own(path))
        if room(modules()[other]) not in ARROWS[name] | {name}
    ]
    assert not wrong, "\n".join(wrong)


def test_the_table_has_no_circle() -> None:
    tuple(TopologicalSorter(ARROWS).static_order())


def test_no_two_files_import_each_other() -> None:
    graph = {name: own(path) - {name} for name, path in modules().items()}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail("a circle: " + " -> ".join(error.args[1]))


def test_no_room_has_too_many_modules() -> None:
    counts: dict[Path, int] = {}
    for path in modules().values():
        if path.name != "__init__.py":
            counts[path.parent] = counts.get(path.parent, 0) + 1
    crowded = {str(folder.relative_to(SOURCE)): count for folder, count in counts.items() if count > MOST_MODULES}
    assert not crowded, f"rooms of more than {MOST_MODULES} modules: {crowded}"


@pytest.mark.parametrize("name", STANDARD_LIBRARY_ONLY)
def test_the_ground_needs_the_standard_library_alone(name: str) -> None:
    for module, path in modules().items():
        if room(path) == name:
            assert not foreign(path), f"{module} imports {sorted(foreign(path))}"


@pytest.mark.parametrize("name", sorted(NO_NAT))
def test_the_engine_and_its_drivers_know_nothing_of_nat(name: str) -> None:
    users = [module for module, path in modules().items() if room(path) == name and "nat" in foreign(path)]
    assert not users, f"{users} import nat"


def test_the_engine_and_its_drivers_load_where_nat_is_not_installed() -> None:
    names = [
        name for name, path in modules().items() if room(path) in {*DRIVERS, "runtime", "replicas", "clients", "types"}
    ]
    code = (
        "import importlib, sys\n"
        "sys.modules['nat'] = None\n"  # importing it raises ModuleNotFoundError
        f"for name in {names}: importlib.import_module(name)\n"
        "import nat_plugin_evsys.types as types; [getattr(types, name) for name in types.__all__]"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", sorted(ONLY))
def test_a_room_uses_no_other_packages(name: str) -> None:
    for module, path in modules().items():
        if room(path) == name:
            assert foreign(path) <= ONLY[name], f"{module} imports {sorted(foreign(path) - ONLY[name])}"


def loaded_at_once(path: Path) -> set[str]:
    """The top-level packages that importing a module loads by itself: neither in a function nor for types alone."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
    return names


@pytest.mark.parametrize("name", NOTHING_HEAVY)
def test_what_nat_discovers_loads_nothing_heavy(name: str) -> None:
    for module, path in modules().items():
        if room(path) == name:
            heavy = sorted(loaded_at_once(path) & HEAVY)
            assert not heavy, f"{module} loads {heavy} at once; import them where they are used"


def test_the_page_names_every_room() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rooms = set(ARROWS) - {"", "defaults"}
    missing = [name for name in sorted(rooms) if f"`{name}/`" not in page and f"`{name}.py`" not in page]
    assert not missing, f"docs/architecture.md has no row for {missing}"
