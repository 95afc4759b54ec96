"""Runs the programs of ``interop/``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from nat_process import ROOT


def run_program(program: str, *arguments: object, python: Path | str = sys.executable, **settings: str) -> list[Any]:
    """The JSON lines that a program of ``interop/`` prints; they are printed again.

    Args:
        settings: environment variables.
    """
    command = [str(python), "-W", "ignore", str(ROOT / "interop" / program), *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "NAT_TELEMETRY_ENABLED": "false", **settings}
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    print(done.stdout)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
