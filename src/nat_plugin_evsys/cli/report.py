"""``nat evsys report``: a run on one page."""

from __future__ import annotations

import webbrowser
from pathlib import Path

import click

from nat_plugin_evsys.cli.options import find_run, output_dir_options, readable_errors


@click.command(name="report")
@click.argument("run", nargs=-1)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="HTML file to write; default: in the run directory.",
)
@click.option("--open", "open_browser", is_flag=True, help="Open the report in the browser.")
@click.option(
    "--max-mb",
    type=click.FloatRange(min=0),
    default=8.0,
    show_default=True,
    help="Size limit of the embedded rollouts; the page says what was left out.",
)
@readable_errors
@output_dir_options
def report_command(
    output_dir: Path, run: tuple[str, ...], output: Path | None, open_browser: bool, max_mb: float
) -> None:
    """Write the report of RUN (a name, a path, or `latest`), or of two runs side by side."""
    from nat_plugin_evsys.report.page import Report

    if len(run) > 2:
        raise click.UsageError(f"{len(run)} runs were given; name one, or two to compare them")
    found = [find_run(output_dir, name) for name in run or ("latest",)]
    together = found[-1].path.parent / f"report-{'-and-'.join(each.path.name for each in found)}.html"
    target = output or (found[0].report_path if len(found) == 1 else together)
    Report([each.path for each in found], megabytes=max_mb).write(target)
    click.echo(target)
    if open_browser:
        webbrowser.open(target.resolve().as_uri())
