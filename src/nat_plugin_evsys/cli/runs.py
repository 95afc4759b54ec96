"""``nat evsys …``: look at runs, serve the engine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nat_plugin_evsys.cli.models import check_command, export_command
from nat_plugin_evsys.cli.options import find_run, no_run_under, output_dir_options, readable_errors, run_options
from nat_plugin_evsys.cli.report import report_command
from nat_plugin_evsys.cli.rollouts import rollouts_command
from nat_plugin_evsys.cli.serve import serve_command
from nat_plugin_evsys.cli.server import scale_command, status_command

if TYPE_CHECKING:
    from nat_plugin_evsys.runs import RunDirectory


@click.group(name="evsys", help="Look at the runs of the evsys finetuning plugin; serve its engine.")
def evsys() -> None:
    """The group."""
    from nat_plugin_evsys.report.summary import write_anything

    write_anything(sys.stdout)


@evsys.result_callback()
def _end(*_: object, **__: object) -> None:
    """End the process here: NAT would write an ANSI reset to stdout, after the JSON that a program may be reading."""
    click.get_current_context().exit()


evsys.add_command(check_command)
evsys.add_command(export_command)
evsys.add_command(report_command)
evsys.add_command(rollouts_command)
evsys.add_command(scale_command)
evsys.add_command(serve_command)
evsys.add_command(status_command)


@evsys.command(name="runs")
@readable_errors
@output_dir_options
def runs_command(output_dir: Path) -> None:
    """List the runs: epochs finished, rewards, and the path of the newest adapter."""
    from nat_plugin_evsys.errors import CheckpointError
    from nat_plugin_evsys.runs import RunDirectory, further_policies

    found = RunDirectory.paths(output_dir)
    if not found:
        raise click.ClickException(no_run_under(output_dir))
    for path in found:
        try:
            run = RunDirectory.open(path)
            click.echo(_line(run))
            for name, policy in further_policies(run).items():
                click.echo(f"  and {_line(policy, name)}")
        except CheckpointError as error:
            click.echo(f"{path.name}  unreadable: {error}")


@evsys.command(name="show")
@readable_errors
@run_options
def show_command(output_dir: Path, run: str) -> None:
    """Print the summary of RUN (a name, a path, or `latest`)."""
    from nat_plugin_evsys.report.summary import RunSummary
    from nat_plugin_evsys.runs import further_policies

    found = find_run(output_dir, run)
    for name, policy in {**further_policies(found), found.path.name: found}.items():  # its own last, as the run ends
        if policy.summary_path.is_file():
            click.echo(RunSummary.read(policy.summary_path).format(policy.summary_path))
        else:
            click.echo(_line(policy, name))
            if policy.state.error:
                click.echo(f"  {policy.state.error}")


@evsys.command(name="plot")
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), help="PNG file to write; default: the run's own."
)
@readable_errors
@run_options
def plot_command(output_dir: Path, run: str, output: Path | None) -> None:
    """Draw the reward curve of RUN (a name, a path, or `latest`) from its metrics."""
    from nat_plugin_evsys.report.metrics_log import MetricsLog
    from nat_plugin_evsys.report.plot import plot_rewards

    found = find_run(output_dir, run)
    target = output or found.plot_path
    plot_rewards(MetricsLog(found.metrics_path).rows(), target)
    click.echo(target)


def _line(run: RunDirectory, name: str | None = None) -> str:
    state = run.state
    last = state.last_checkpoint()
    base = "" if state.heldout_reward_base is None else f"{_reward(state.heldout_reward_base)} -> "
    rewards = [
        f"{name} {base}{_reward(before)} -> {_reward(after)}"
        for name, base, before, after in (
            ("training", "", state.train_reward_before, state.train_reward_after),
            ("held-out", base, state.heldout_reward_before, state.heldout_reward_after),
        )
        if before is not None or after is not None
    ]
    adapter = "no adapter" if last is None else str(run.locate(last.adapter))
    if last is not None and not state.has_trained:
        adapter = "nothing trained"
    epochs = f"{state.epochs_done} epoch{'' if state.epochs_done == 1 else 's'}"
    return "  ".join([name or run.path.name, state.status, epochs, *rewards, adapter])


def _reward(value: float | None) -> str:
    return "?" if value is None else f"{value:.3f}"
