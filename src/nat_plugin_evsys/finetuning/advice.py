"""What to type next: the texts that a run ends with."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path


def how_to_resume(trainer_name: str | None) -> str:
    """The option that goes on with a run that ended early."""
    return f"To go on from the last finished epoch: -o trainers.{trainer_name}.resume true"


def serve_command() -> str:
    """The command that serves what the run trained: the same `nat` on the same YAML."""
    import click

    context = click.get_current_context(silent=True)
    config_file = Path(str(context.params.get("config_file", "CONFIG.yml"))) if context else Path("CONFIG.yml")
    if config_file.is_relative_to(Path.cwd()):
        config_file = config_file.relative_to(Path.cwd())
    return f'{_nat_command() if context else "nat"} run --config_file {config_file} --input "…"'


def _nat_command() -> str:
    """What to type to run the `nat` of this process: its name where PATH finds it, else its path."""
    program = Path(sys.argv[0])
    found = shutil.which(program.name)
    if found is not None and Path(found).resolve() == program.resolve():
        return program.name
    return os.path.relpath(program)
