"""``nat evsys rollouts``: print what was said in a run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from nat_plugin_evsys.cli.options import find_run, readable_errors, run_options
from nat_plugin_evsys.json_lines import escape_line_ends

if TYPE_CHECKING:
    from nat.atif import Trajectory

    from nat_plugin_evsys.runs.rollouts import Collection, CollectionKind, RolloutFiles

Order = Literal["worst", "best"]


@click.command(name="rollouts")
@click.option("--epoch", type=click.IntRange(min=0), help="Epoch to show; default: the newest one kept.")
@click.option(
    "--kind",
    type=click.Choice(["epoch", "heldout", "train", "base"]),
    default="epoch",
    show_default=True,
    help="epoch: its training rollouts. heldout, train: those rows after that many epochs. base: the held-out rows "
    "before the warm start.",
)
@click.option("--worst", "order", flag_value="worst", help="Lowest reward first, after those without a reward.")
@click.option("--best", "order", flag_value="best", help="Highest reward first.")
@click.option("--row", help="Only the attempts at the dataset row with this id.")
@click.option("--limit", type=click.IntRange(min=1), default=10, show_default=True, help="Most rollouts to show.")
@click.option("--json", "as_json", is_flag=True, help="Print ATIF trajectories, one JSON object per line.")
@readable_errors
@run_options
def rollouts_command(
    output_dir: Path,
    run: str,
    epoch: int | None,
    kind: CollectionKind,
    order: Order | None,
    row: str | None,
    limit: int,
    as_json: bool,
) -> None:
    """Print the rollouts of RUN (a name, a path, or `latest`): what was said, rewarded and trained on."""
    named = find_run(output_dir, run)
    files = named.rollouts
    collection = _collection(files, kind, epoch)
    found = _select(_read(files, collection, row), order)
    if as_json:
        for trajectory in found[:limit]:
            click.echo(escape_line_ends(trajectory.model_dump_json(exclude_none=True)))
        return
    _show(f"{named.path.name}, {collection}", found, limit)


def _collection(files: RolloutFiles, kind: CollectionKind, epoch: int | None) -> Collection:
    from nat_plugin_evsys.errors import DataError

    kept = [collection for collection in files.collections() if collection.kind == kind]
    chosen = [collection for collection in kept if epoch in (None, collection.epoch)]
    if chosen:
        return chosen[-1]
    names = ", ".join(map(str, files.collections())) or "nothing (see trainers.<name>.keep_rollouts)"
    wanted = f"--kind {kind}" + ("" if epoch is None else f" --epoch {epoch}")
    raise DataError(f"{files.directory.parent} has no rollouts for {wanted}; it has: {names}")


def _read(files: RolloutFiles, collection: Collection, row: str | None) -> list[Trajectory]:
    from nat.atif import Trajectory

    from nat_plugin_evsys.errors import DataError

    found = [Trajectory.model_validate_json(line) for line in files.lines(collection)]
    if row is None:
        return found
    rows = list(dict.fromkeys(str((trajectory.extra or {}).get("row_id")) for trajectory in found))
    if row not in rows:
        raise DataError(f"--row {row}: no such row in {files.path(collection)}; it has: {', '.join(rows)}")
    return [trajectory for trajectory in found if str((trajectory.extra or {}).get("row_id")) == row]


def _select(found: list[Trajectory], order: Order | None) -> list[Trajectory]:
    if order is None:
        return found
    return sorted(found, key=_reward, reverse=order == "best")


def _reward(trajectory: Trajectory) -> float:
    reward = (trajectory.extra or {}).get("reward")
    return -math.inf if reward is None else float(reward)


def _show(name: str, found: list[Trajectory], limit: int) -> None:
    from rich.console import Console

    from nat_plugin_evsys.report.transcripts import transcript

    console = Console(highlight=False)
    for trajectory in found[:limit]:
        console.print(transcript(trajectory))
    more = f"; --limit {len(found)} shows all" if len(found) > limit else ""
    console.print(f"{name}: {min(limit, len(found))} of {len(found)} rollouts{more}", markup=False)
