"""Environments for what cannot be installed beside the project: its own packages, and the project's below them."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

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
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # pip also complains about packages of the project whose needs are others; that is meant.
    for arguments in [needs, ("--no-deps", *forced)] if forced else [needs]:
        installed = subprocess.run([*pip, *arguments], capture_output=True, text=True)
        assert installed.returncode == 0, f"pip cannot install {' '.join(arguments)}:\n{installed.stderr}"
    done.write_text(wanted)
    return python
