"""``environment.json``: versions and command of each process that worked on the run."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from nat_plugin_evsys.files import atomic_write
from nat_plugin_evsys.json_lines import to_json
from nat_plugin_evsys.runs.settings import redact

FILE = "environment.json"

PACKAGES = (
    "nat_plugin_evsys",
    "nvidia-nat-core",
    "nvidia-nat-eval",
    "nvidia-nat-langchain",
    "torch",
    "transformers",
    "tokenizers",
    "peft",
    "tinker",
    "numpy",
)
"""Packages whose versions decide what a run computes."""


def describe_environment() -> dict[str, Any]:
    """This process: start time, command without secrets, versions and machine."""
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join(_without_secrets([Path(sys.argv[0]).name, *sys.argv[1:]])),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "packages": {name: found for name in PACKAGES if (found := _version(name)) is not None},
    }


def add_environment(run_dir: Path) -> None:
    """Record that this process works on the run."""
    sessions = [*read_environments(run_dir), describe_environment()]
    atomic_write(run_dir / FILE, to_json({"sessions": sessions}, indent=1) + "\n")


def read_environments(run_dir: Path) -> list[dict[str, Any]]:
    """The processes that worked on the run, oldest first; none for a run of an older version."""
    try:
        return list(json.loads((run_dir / FILE).read_text(encoding="utf-8"))["sessions"])
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _without_secrets(command: list[str]) -> list[str]:
    """``-o llms.policy.api_key …`` and ``--api-key=…`` name a secret, like the setting in the YAML."""
    named = zip(["", *command[:-1]], command, strict=True)
    return [_without_own_secret(_shown(name, word)) for name, word in named]


def _without_own_secret(word: str) -> str:
    parts = word.split("=")
    for at in range(1, len(parts)):
        value = "=".join(parts[at:])
        if (shown := _shown(parts[at - 1], value)) != value:
            return "=".join([*parts[:at], shown])
    return word


def _shown(name: str, value: str) -> str:
    setting = name.rpartition(".")[2]
    return str(redact({setting: value})[setting])


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
