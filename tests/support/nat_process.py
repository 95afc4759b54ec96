"""Runs the real ``nat`` command in a process of its own, and reads what it leaves behind."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from warm_process import WarmProcess

ROOT = Path(__file__).resolve().parents[2]
CAPTURE_DIR = ROOT / "tests" / "e2e" / "http_capture"


@dataclass
class Finished:
    """What a command printed and how it ended."""

    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return self.out + self.err


def environment(**extra: str) -> dict[str, str]:
    return {**os.environ, "NAT_TELEMETRY_ENABLED": "false", "NO_COLOR": "1", **extra}


def run_nat(*args: str, timeout: float = 240, python: Path | None = None, **env: str) -> Finished:
    """`nat <args>` from the repository's root, as the README says.

    Args:
        python: the interpreter of another environment.
    """
    if python is not None:
        command = [str(python), "-m", "nat.cli.main", *args]
        done = subprocess.run(
            command, cwd=ROOT, env=environment(**env), capture_output=True, text=True, timeout=timeout, check=False
        )
        return Finished(done.returncode, done.stdout, done.stderr)
    with tempfile.TemporaryDirectory() as directory:
        out, err = Path(directory) / "out", Path(directory) / "err"
        process = WarmProcess([*args], env=environment(**env), cwd=ROOT, out=out, err=err)
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"nat {' '.join(args)} takes over {timeout} s:\n{err.read_text()[-3000:]}") from None
        finally:
            process.kill()
        return Finished(code, out.read_text(), err.read_text())


def plugin_path(directory: Path, modules: Sequence[str], *search: Path) -> str:
    """A PYTHONPATH on which ``nat`` discovers the functions of these modules.

    Args:
        directory: a new one, which is to look like an installed package.
        search: where the modules and what they need are found.
    """
    installed = directory / "plugins-0.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: plugins\nVersion: 0\n")
    entries = "\n".join(f"{module} = {module}" for module in modules)
    (installed / "entry_points.txt").write_text(f"[nat.plugins]\n{entries}\n")
    return os.pathsep.join([str(directory), *map(str, search), *filter(None, [os.environ.get("PYTHONPATH")])])


def start_nat(*args: str, log: Path, **env: str) -> WarmProcess:
    """The same, left running; its output goes to ``log``."""
    return WarmProcess([*args], env=environment(**env), cwd=ROOT, out=log, err=log)


def first_rows(path: Path, count: int, target: Path) -> Path:
    """A JSON dataset of the first ``count`` rows of another."""
    target.write_text(json.dumps(json.loads(path.read_text())[:count]))
    return target


def newest_run(tmp_path: Path) -> Path:
    """The run directory of the newest run."""
    runs = tmp_path / "runs"
    return runs / (runs / "latest").read_text().strip()


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
