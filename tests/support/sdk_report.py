"""Runs ``tests/service/sdk_script.py``, which makes every call of the tinker SDK, against a server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).parents[1] / "service" / "sdk_script.py"


def sdk_report(url: str, model: Path, *, timeout: float, **environment: str) -> dict[str, Any]:
    """What the script printed last: ``problems``, ``skipped`` and ``facts``.

    Args:
        environment: variables in which its process differs from this one.
    """
    done = subprocess.run(
        [sys.executable, str(SCRIPT), url, str(model)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.stdout.strip(), done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
