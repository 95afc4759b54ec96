"""Builtin models that are made on this machine: once, whole, and again when they were damaged."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from copied_model import NAME, CopyRecipe

from nat_plugin_evsys.engine.model import builtin
from nat_plugin_evsys.errors import ModelError


@pytest.fixture(autouse=True)
def _recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(builtin.RECIPES, NAME, CopyRecipe())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that nothing happened to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(builtin.RECIPES, NAME, CopyRecipe())
        return builtin.ensure_builtin(NAME, tmp_path_factory.mktemp("builtin"))


def test_two_builds_give_identical_files(made: Path, tmp_path: Path) -> None:
    again = builtin.ensure_builtin(NAME, tmp_path)
    assert again.name == made.name
    names = sorted(path.name for path in made.iterdir())
    assert names == sorted(path.name for path in again.iterdir())
    assert [name for name in names if (made / name).read_bytes() != (again / name).read_bytes()] == []
    assert [path.name for path in tmp_path.iterdir()] == [again.name], "the build left something behind"


def test_a_model_that_is_there_is_not_built_again(made: Path) -> None:
    before = (made / "model.safetensors").stat().st_mtime_ns
    assert builtin.ensure_builtin(NAME, made.parent) == made
    assert (made / "model.safetensors").stat().st_mtime_ns == before


def test_another_recipe_has_another_directory(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(builtin.RECIPES, NAME, CopyRecipe(release=2))
    other = builtin.ensure_builtin(NAME, made.parent)
    assert other != made
    assert sorted(made.parent.iterdir()) == sorted([made, other])


def test_unknown_name_lists_the_known_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(builtin.RECIPES, NAME)
    with pytest.raises(ModelError, match=r"no builtin model `builtin/huge`.*`builtin/smollm2-135m`, `builtin/tiny`"):
        builtin.ensure_builtin("builtin/huge", tmp_path)
    assert list(tmp_path.iterdir()) == []


def damage_weights(directory: Path) -> None:
    weights = directory / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)


def tear_weights(directory: Path) -> None:
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])


@pytest.mark.parametrize(
    "harm",
    [
        damage_weights,
        tear_weights,
        lambda directory: (directory / "tokenizer.json").unlink(),
        lambda directory: (directory / builtin.CHECKSUMS).write_text("[1]"),
    ],
    ids=["one bit", "torn", "a file is missing", "checksums are damaged"],
)
def test_what_was_damaged_is_made_again(
    harm: Callable[[Path], None],
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    copy = shutil.copytree(made, tmp_path / made.name)
    harm(copy)
    assert builtin.ensure_builtin(NAME, tmp_path) == copy
    assert "damaged; rebuilding `builtin/copy`" in caplog.text
    assert [path.name for path in copy.iterdir() if path.read_bytes() != (made / path.name).read_bytes()] == []
    assert [path.name for path in tmp_path.iterdir()] == [made.name]


def test_two_processes_that_make_it_at_once_both_end_with_a_whole_one(made: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from nat_plugin_evsys.engine.model import builtin;"
        "from copied_model import NAME, CopyRecipe;"
        "builtin.RECIPES[NAME] = CopyRecipe(); sys.stdin.readline();"
        "print(builtin.ensure_builtin(NAME, Path(sys.argv[1])))"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    racers = [subprocess.Popen(command, **pipes, env=environment) for _ in range(2)]  # type: ignore[call-overload]
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    printed = {racer.communicate(timeout=250)[0].strip() for racer in racers}
    assert [racer.returncode for racer in racers] == [0, 0]
    assert printed == {str(tmp_path / made.name)}
    assert [path.name for path in tmp_path.iterdir()] == [made.name]
    assert [
        path.name for path in made.iterdir() if path.read_bytes() != (tmp_path / made.name / path.name).read_bytes()
    ] == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    with pytest.raises(ModelError, match=r"cannot build `builtin/copy` at .*; set EVSYS_CACHE to a directory"):
        builtin.ensure_builtin(NAME, tmp_path / "file")
