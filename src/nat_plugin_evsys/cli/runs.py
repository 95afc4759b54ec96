"""``nat evsys …``: look at runs, serve the engine."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nat_plugin_evsys.cli.serve import serve_command, status_command
from nat_plugin_evsys.errors import EvsysError

if TYPE_CHECKING:
    from nat_plugin_evsys.runs import RunDirectory

DEFAULT_OUTPUT_DIR = "./.tmp/nat/finetuning/"


def _readable_errors(command: Callable[..., None]) -> Callable[..., None]:
    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except EvsysError as error:
            raise click.ClickException(str(error)) from error

    return wrapped


def _run_options(command: Callable[..., None]) -> Callable[..., None]:
    """The option and argument that name one run."""
    command = click.argument("run", default="latest")(command)
    return _output_dir_option(command)


def _output_dir_option(command: Callable[..., None]) -> Callable[..., None]:
    return click.option(
        "--output_dir",
        type=click.Path(file_okay=False, path_type=Path),
        default=DEFAULT_OUTPUT_DIR,
        show_default=True,
        help="Where the runs lie (finetuning.output_dir).",
    )(command)


@click.group(name="evsys", help="Look at the runs of the evsys finetuning plugin; serve its engine.")
def evsys() -> None:
    """The group."""


evsys.add_command(serve_command)
evsys.add_command(status_command)


@evsys.command(name="runs")
@_output_dir_option
@_readable_errors
def runs_command(output_dir: Path) -> None:
    """List the runs: epochs finished, rewards, and where the newest adapter lies."""
    from nat_plugin_evsys.runs import RunDirectory

    found = RunDirectory.all(output_dir)
    if not found:
        raise click.ClickException(f"no run under {output_dir}; run `nat finetune …` first, or give --output_dir")
    for run in found:
        click.echo(_line(run))


@evsys.command(name="show")
@_run_options
@_readable_errors
def show_command(output_dir: Path, run: str) -> None:
    """Print the summary of RUN (a name, a path, or `latest`)."""
    from nat_plugin_evsys.report.summary import RunSummary

    found = _find(output_dir, run)
    if found.summary_path.is_file():
        click.echo(RunSummary.read(found.summary_path).format(found.summary_path))
    else:
        click.echo(_line(found))
        if found.state.error:
            click.echo(f"  {found.state.error}")


@evsys.command(name="plot")
@_run_options
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="PNG to write; default: the run's own.")
@_readable_errors
def plot_command(output_dir: Path, run: str, output: Path | None) -> None:
    """Draw the reward curve of RUN (a name, a path, or `latest`) from its metrics."""
    from nat_plugin_evsys.report.metrics import MetricsLog
    from nat_plugin_evsys.report.plot import plot_rewards

    found = _find(output_dir, run)
    target = output or found.plot_path
    plot_rewards(MetricsLog(found.metrics_path).rows(), target)
    click.echo(target)


def _find(output_dir: Path, run: str) -> RunDirectory:
    from nat_plugin_evsys.errors import CheckpointError
    from nat_plugin_evsys.runs import RunDirectory

    if run == "latest":
        newest = RunDirectory.newest(output_dir)
        if newest is None:
            raise CheckpointError(f"no run under {output_dir}; run `nat finetune …` first, or give --output_dir")
        return newest
    inside = output_dir / run
    return RunDirectory.open(inside if inside.is_dir() else Path(run))


def _line(run: RunDirectory) -> str:
    state = run.state
    last = state.last_checkpoint()
    rewards = [
        f"{name} {_reward(before)} -> {_reward(after)}"
        for name, before, after in (
            ("training", state.train_reward_before, state.train_reward_after),
            ("held-out", state.heldout_reward_before, state.heldout_reward_after),
        )
        if before is not None or after is not None
    ]
    adapter = "no adapter" if last is None else str(run.locate(last.adapter))
    if last is not None and not state.has_trained:
        adapter = "nothing trained"
    epochs = f"{state.epochs_done} epoch{'' if state.epochs_done == 1 else 's'}"
    return "  ".join([run.path.name, state.status, epochs, *rewards, adapter])


def _reward(value: float | None) -> str:
    return "?" if value is None else f"{value:.3f}"
