"""Shared by the commands that read a run: naming a run, and showing errors without a traceback."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nat_plugin_evsys.errors import EvsysError

if TYPE_CHECKING:
    from nat_plugin_evsys.runs import RunDirectory

DEFAULT_OUTPUT_DIR = "./.tmp/nat/finetuning/"


def readable_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Show this package's errors as one line; their text says what to type."""

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except EvsysError as error:
            raise click.ClickException(str(error)) from error

    return wrapped


def run_options(command: Callable[..., None]) -> Callable[..., None]:
    """The option and argument that name one run."""
    command = click.argument("run", default="latest")(command)
    return output_dir_option(command)


def output_dir_option(command: Callable[..., None]) -> Callable[..., None]:
    """The option for the directory of the runs."""
    return click.option(
        "--output_dir",
        type=click.Path(file_okay=False, path_type=Path),
        default=DEFAULT_OUTPUT_DIR,
        show_default=True,
        help="Directory of the runs (finetuning.output_dir).",
    )(command)


def find_run(output_dir: Path, run: str) -> RunDirectory:
    """The run that a user named: ``latest``, a name under ``output_dir``, or a path.

    Raises:
        CheckpointError: there is none.
    """
    from nat_plugin_evsys.errors import CheckpointError
    from nat_plugin_evsys.runs import RunDirectory

    if run == "latest":
        newest = RunDirectory.newest(output_dir)
        if newest is None:
            raise CheckpointError(f"no run under {output_dir}; run `nat finetune …` first, or give --output_dir")
        return newest
    inside = output_dir / run
    return RunDirectory.open(inside if inside.is_dir() else Path(run))
