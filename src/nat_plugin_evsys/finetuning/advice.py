"""The texts that a run ends with: what to type next, and why."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from nat_plugin_evsys.calls import DropReason

if TYPE_CHECKING:
    from nat_plugin_evsys.report.summary import RunSummary

_TRAINING_ONLY = ("trainers.", "trainer_adapters.", "trajectory_builders.")


def how_to_resume(trainer_name: str | None, epochs_done: int) -> str:
    """The option that continues a run that ended early."""
    where = f"after epoch {epochs_done}" if epochs_done else "from its start"
    return f"To continue this run {where}: -o trainers.{trainer_name}.resume true"


def serve_command(checkpoints: Mapping[str, str]) -> str:
    """The command that serves what the run trained: the same `nat` on the same YAML with the same overrides.

    Those of what only `nat finetune` reads are left out.

    Args:
        checkpoints: by what the YAML calls the policy, its ``checkpoint`` setting; a path there would be served instead
            of the trained adapter.
    """
    import click

    context = click.get_current_context(silent=True)
    given = context.params if context else {}
    config_file = Path(str(given.get("config_file", "CONFIG.yml")))
    if config_file.is_relative_to(Path.cwd()):
        config_file = config_file.relative_to(Path.cwd())
    words = [_nat_command() if context else "nat", "run", "--config_file", str(config_file)]
    for name, value in given.get("override") or ():
        if not name.startswith(_TRAINING_ONLY):
            words += ["--override", name, value]  # `nat run` has no -o
    for policy_name, checkpoint in checkpoints.items():
        if checkpoint not in ("latest", "best"):
            words += ["--override", f"llms.{policy_name}.checkpoint", "latest"]
    return f'{shlex.join(words)} --input "…"'


def why_nothing_was_trained(summary: RunSummary) -> str:
    """The error that ends a run without a single trained call."""
    if summary.findings:
        why = summary.findings[0]["sentence"]
    else:
        dropped = {reason: count for reason, count in summary.dropped.items() if reason != DropReason.VALIDATION}
        reasons = sorted((count, reason) for reason, count in dropped.items())
        counts = ", ".join(f"{reason} {count}" for count, reason in reversed(reasons))
        why = f"Every call was dropped ({counts})." if counts else "The rollouts made no calls to the policy."
    epochs = f"{summary.epochs} epoch{'' if summary.epochs == 1 else 's'}"
    return f"nothing was trained in {epochs}, so there is no adapter to serve. {why}"


def _nat_command() -> str:
    """How to call this process's `nat`: its name if it is on PATH, else its path."""
    program = Path(sys.argv[0])
    found = shutil.which(program.name)
    if found is not None and Path(found).resolve() == program.resolve():
        return program.name
    return os.path.relpath(program)
