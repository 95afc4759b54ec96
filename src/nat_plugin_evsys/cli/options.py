"""Shared by the commands that read a run: naming a run, and showing errors without a traceback."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nat_plugin_evsys.errors import ConfigError, EvsysError

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
    """The options and the argument that name one run."""
    command = click.argument("run", default="latest")(command)
    return output_dir_options(command)


def output_dir_options(command: Callable[..., None]) -> Callable[..., None]:
    """``--output_dir`` and ``--config_file``; the command gets one ``output_dir``."""

    @wraps(command)
    def wrapped(*args: Any, output_dir: Path | None, config_file: Path | None, **kwargs: Any) -> None:
        command(*args, output_dir=_output_dir(output_dir, config_file), **kwargs)

    given = click.option(
        "--output_dir",
        type=click.Path(file_okay=False, path_type=Path),
        help=f"Directory of the runs (finetuning.output_dir); default: {DEFAULT_OUTPUT_DIR}",
    )(wrapped)
    return config_file_option("Read the directory of the runs from this YAML.")(given)


def config_file_option(what: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """``--config_file``, as the commands of `nat` call it."""
    return click.option("--config_file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help=what)


def read_config(config_file: Path) -> dict[str, Any]:
    """The YAML as NAT reads it, with its base file and its environment variables, but not validated.

    Raises:
        ConfigError: it cannot be read.
    """
    import yaml
    from nat.utils.io.yaml_tools import yaml_load

    try:
        return yaml_load(config_file)
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config_file {config_file.absolute()}: cannot be read: {error}") from error
    except AssertionError as error:  # NAT's only check
        raise ConfigError(
            f"--config_file {config_file.absolute()}: the file, and its base file, must be a mapping of sections, "
            "such as `llms:` and `finetuning:`"
        ) from error


def mapping_of(config_file: Path, parent: dict[str, Any], name: str) -> dict[str, Any]:
    """The mapping that the YAML has under ``name``; an empty one if there is none.

    Raises:
        ConfigError: something else is there.
    """
    value = parent.get(name) or {}
    if not isinstance(value, dict):
        raise ConfigError(f"--config_file {config_file.absolute()}: {name} must be a mapping, got {value!r:.40}")
    return value


def find_run(output_dir: Path, run: str) -> RunDirectory:
    """The run that a user named: ``latest``, a name under ``output_dir``, or a path.

    Where ``latest`` passes over a newer run, a line on stderr says so.

    Raises:
        CheckpointError: there is none.
    """
    from nat_plugin_evsys.errors import CheckpointError
    from nat_plugin_evsys.runs import RunDirectory, latest_to_show

    if run == "latest":
        latest = latest_to_show(output_dir)
        if latest is None:
            raise CheckpointError(no_run_under(output_dir))
        if latest.notice is not None:
            click.echo(f"{latest.notice}. Name a run to see that one", err=True)
        return latest.run
    inside = output_dir / run
    return RunDirectory.open(inside if inside.is_dir() else Path(run))


def no_run_under(output_dir: Path) -> str:
    """What to type where there are no runs."""
    return f"no run under {output_dir.absolute()}; run `nat finetune …` first, or give --output_dir or --config_file"


def _output_dir(output_dir: Path | None, config_file: Path | None) -> Path:
    if config_file is None:
        return output_dir or Path(DEFAULT_OUTPUT_DIR)
    if output_dir is not None:
        raise click.UsageError("--config_file names the directory of the runs; remove --output_dir")
    section = mapping_of(config_file, read_config(config_file), "finetuning")
    return Path(str(section.get("output_dir") or DEFAULT_OUTPUT_DIR))
