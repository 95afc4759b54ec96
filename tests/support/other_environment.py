"""Environments for what cannot be installed beside the project: its own packages, and the project's below them."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from nat_process import ROOT


def python_with(name: str, needs: tuple[str, ...], forced: tuple[str, ...] = ()) -> Path:
    """The interpreter of ``.venv-<name>``, which has ``needs`` and otherwise what the project has: installed once.

    Args:
        needs: pip's requirements. An environment that has them is used as it is.
        forced: installed after them, whatever they say of it.
    """
    environment = ROOT / f".venv-{name}"
    python, done = environment / "bin" / "python", environment / ".installed"
    wanted = "\n".join([*needs, *forced])
    if done.exists() and done.read_text() == wanted:
        return python
    if not python.exists():
        venv.create(environment, with_pip=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = environment / "lib" / version / "site-packages"
    # addsitedir reads the .pth files there too: the project itself is installed by one
    (site / "zz_project.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    # pip also complains about packages of the project whose needs are others; that is meant.
    for arguments in [needs, ("--no-deps", *forced)] if forced else [needs]:
        _install(python, arguments)
    done.write_text(wanted)
    return python


def python_apart(name: str, needs: tuple[str, ...], version: str) -> Path:
    """The interpreter of ``.venv-<name>``, of another Python, which has ``needs`` and nothing of the project.

    Args:
        version: such as ``3.12``. Without such a Python the test is skipped.
    """
    environment = ROOT / f".venv-{name}"
    python, done = environment / "bin" / "python", environment / ".installed"
    wanted = "\n".join(needs)
    if done.exists() and done.read_text() == wanted:
        return python
    found = subprocess.run([str(ROOT / "scripts/find-python"), version], capture_output=True, text=True)
    if found.returncode:
        pytest.skip(f"{needs[0]} needs Python {version}, which is not installed")
    subprocess.run([found.stdout.strip(), "-m", "venv", str(environment)], check=True)
    _install(python, needs)
    done.write_text(wanted)
    return python


def _install(python: Path, arguments: tuple[str, ...]) -> None:
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    installed = subprocess.run([*pip, *arguments], capture_output=True, text=True)
    assert installed.returncode == 0, f"pip cannot install {' '.join(arguments)}:\n{installed.stderr}"
