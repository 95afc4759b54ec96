"""What an installation promises: entry points, light imports, a licence, and commands that start."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "art", "peft", "tinker", "matplotlib.pyplot", "langchain_openai")


@pytest.mark.parametrize(
    "module",
    ["nat_plugin_evsys.config", "nat_plugin_evsys.register", "nat_plugin_evsys.cli.runs", "nat_plugin_evsys.runs"],
)
def test_importing_it_loads_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print([name for name in {HEAVY!r} if name in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_nat_finds_the_plugin_and_the_command() -> None:
    (plugin,) = entry_points(group="nat.plugins", name="nat_plugin_evsys")
    assert plugin.value == "nat_plugin_evsys.register"
    (command,) = entry_points(group="nat.cli", name="evsys")
    assert command.load().name == "evsys"


def test_nat_evsys_runs_in_nats_own_command(tmp_path: Path) -> None:
    nat = Path(sys.executable).with_name("nat")
    command = [str(nat), "evsys", "runs", "--output_dir", str(tmp_path)]
    shown = subprocess.run(command, capture_output=True, text=True, check=False)
    assert shown.returncode == 1
    assert f"Error: no run under {tmp_path}" in shown.stderr


def test_licence_is_apache_2_with_its_appendix() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert text.lstrip().startswith("Apache License")
    assert "END OF TERMS AND CONDITIONS" in text
    assert "APPENDIX: How to apply the Apache License to your work." in text


@pytest.fixture
def make_venv(tmp_path: Path) -> Path:
    """scripts/make-venv, with a PATH of its own to fill."""
    if shutil.which("sh") is None:
        pytest.skip("no sh")
    (tmp_path / "bin").mkdir()
    return tmp_path / "bin"


def python(path: Path, name: str, version: str, has_venv: bool = True) -> None:
    """A stand-in interpreter that answers what the script asks of one."""
    script = path / name
    script.write_text(
        "#!/bin/sh\n"
        f'case "$2" in *version_info*) exec {sys.executable} -c "import sys; sys.version_info = ({version}, 0); $2";;\n'
        f"*ensurepip*) exit {0 if has_venv else 1};; esac\n"
        f'echo "{name} $*"\n'
    )
    script.chmod(0o755)


def run_make_venv(path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["/bin/sh", str(ROOT / "scripts" / "make-venv"), "target", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PATH": str(path)})


def test_make_venv_takes_the_newest_python_that_fits(make_venv: Path) -> None:
    python(make_venv, "python3", "3, 9")
    python(make_venv, "python3.11", "3, 11")
    assert run_make_venv(make_venv).stdout.strip() == "python3.11 -m venv target"
    python(make_venv, "python3.12", "3, 12")
    assert run_make_venv(make_venv).stdout.strip() == "python3.12 -m venv target"
    assert run_make_venv(make_venv, "python3.11").stdout.strip() == "python3.11 -m venv target"


@pytest.mark.parametrize("version", ["3, 10", "3, 14"])
def test_make_venv_says_what_to_install(make_venv: Path, version: str) -> None:
    python(make_venv, "python3", version)
    result = run_make_venv(make_venv)
    assert result.returncode == 1
    assert "no Python 3.11, 3.12 or 3.13" in result.stderr
    assert "PYTHON=" in result.stderr


def test_make_venv_says_when_the_venv_package_is_missing(make_venv: Path) -> None:
    python(make_venv, "python3.12", "3, 12", has_venv=False)
    result = run_make_venv(make_venv)
    assert result.returncode == 1
    assert "python3-venv" in result.stderr
