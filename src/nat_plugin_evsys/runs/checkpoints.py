"""Locates a checkpoint: from the YAML's setting to a directory, or to a path on a Tinker service.

On disk a checkpoint is a directory with a ``manifest.json``. Whoever writes one renames it into place when it is whole,
so a half-written one is never seen here. A ``tinker://`` path is left to the service.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from nat_plugin_evsys.errors import CheckpointError, ConfigError
from nat_plugin_evsys.runs.directory import RunDirectory
from nat_plugin_evsys.runs.latest import latest_to_serve
from nat_plugin_evsys.runs.policies import further_policies
from nat_plugin_evsys.runs.state import CheckpointRecord

MANIFEST = "manifest.json"
PEFT_CONFIG = "adapter_config.json"
"""An adapter of another program has this, but no manifest."""

SERVICE_SCHEME = "tinker://"


def is_checkpoint(directory: Path) -> bool:
    """Whether a directory is a checkpoint, or an adapter of another program."""
    return any((directory / name).is_file() for name in (MANIFEST, PEFT_CONFIG))


def is_service_path(where: Path | str) -> bool:
    """True for a checkpoint of a Tinker service."""
    return isinstance(where, str) and where.startswith(SERVICE_SCHEME)


def resolve_checkpoint(
    output_dir: Path | str, spec: str, is_named: Callable[[str], bool] = lambda name: False
) -> Path | str | None:
    """The checkpoint that ``spec`` means: an absolute path, a tinker:// path, or None for ``none`` (the base model).

    Args:
        output_dir: directory of the runs (``finetuning.output_dir``).
        spec: ``none``, ``latest`` or ``best`` (of the newest run with a trained epoch; see ``latest_to_serve``), or the
            path of a checkpoint.
        is_named: whether a policy of this name is meant; a run that trains several has a checkpoint of each.

    Raises:
        ConfigError: ``spec`` is empty.
        CheckpointError: there is no such run or checkpoint; the message says what to type.
    """
    word = spec.strip()
    if not word:
        raise ConfigError("checkpoint is empty; set it to none, latest, best or the path of a checkpoint")
    if word == "none":
        return None
    if word in ("latest", "best"):
        return _of_newest_run(Path(output_dir), word, is_named)
    if is_service_path(word):
        return word
    return _of_path(Path(word).expanduser())


def checkpoint_of(run: RunDirectory, word: str, setting: str) -> Path | str:
    """The ``latest`` or ``best`` checkpoint of a run that has trained: a path, or a tinker:// path.

    Args:
        setting: what the word was given to, as an error calls it.

    Raises:
        CheckpointError: none has a reward, or it is not there any more.
    """
    record = run.state.last_checkpoint() if word == "latest" else run.state.best_checkpoint()
    if record is None:
        raise CheckpointError(f"{setting} {word}: no checkpoint of run {run.path} has a reward; set {setting} latest")
    return _existing(run, record)


def newer_runs_notice(output_dir: Path | str, spec: str) -> str | None:
    """The sentence to show where ``spec`` passes over a newer run, or None."""
    latest = latest_to_serve(output_dir) if spec.strip() in ("latest", "best") else None
    if latest is None or latest.notice is None:
        return None
    return f"{latest.notice}. To serve another run, set checkpoint: to the path of one of its checkpoints"


def _of_newest_run(output_dir: Path, word: str, is_named: Callable[[str], bool]) -> Path | str:
    latest = latest_to_serve(output_dir)
    if latest is None:
        raise CheckpointError(f"checkpoint: {word}: {_why_none(output_dir)}")
    run = next((each for name, each in further_policies(latest.run).items() if is_named(name)), latest.run)
    if not run.state.has_trained:
        raise CheckpointError(
            f"checkpoint: {word}: {run.path} has trained nothing (the policy `{run.path.name}`); set checkpoint: none "
            "to serve the base model"
        )
    return checkpoint_of(run, word, "checkpoint:")


def _why_none(output_dir: Path) -> str:
    run = RunDirectory.newest(output_dir)
    if run is None:
        return (
            f"no run under {os.path.abspath(output_dir)} yet: run `nat finetune --config_file …` first, "
            "or set checkpoint: none to serve the base model"
        )
    if run.state.checkpoints:
        return (
            f"the newest run, {run.path}, has trained nothing (it is {run.state.status}), so its adapter is the one "
            "that it started from; set checkpoint: none to serve the base model"
        )
    return (
        f"the newest run, {run.path}, has no checkpoint yet (it is {run.state.status}); let it finish an epoch, "
        "or set checkpoint: none"
    )


def _existing(run: RunDirectory, record: CheckpointRecord) -> Path | str:
    where = run.locate(record.adapter)
    if isinstance(where, str):
        return where
    if not (where / MANIFEST).is_file():
        raise CheckpointError(
            f"{where} (epoch {record.epoch} of run {run.path}) has been moved or deleted; name the path of a "
            "checkpoint that exists"
        )
    return where


def _of_path(path: Path) -> Path:
    absolute = Path(os.path.abspath(path))
    if is_checkpoint(absolute):
        return absolute
    if (absolute / RunDirectory.STATE).is_file():
        run = RunDirectory.open(absolute)
        names = ", ".join(str(run.locate(record.adapter)) for record in run.state.checkpoints) or "none yet"
        raise CheckpointError(f"checkpoint: {path} is a run, not a checkpoint; it has: {names}")
    if absolute.exists():
        raise CheckpointError(f"checkpoint: {path} is not a checkpoint: it has no {MANIFEST} and no {PEFT_CONFIG}")
    raise CheckpointError(
        f"checkpoint: there is no {absolute}; set it to none, latest, best or the path of a checkpoint directory"
    )
