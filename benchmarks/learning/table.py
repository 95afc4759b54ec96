"""RESULTS.md and its plot, from the curves that have been kept."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from curve import Curve
from matplotlib.figure import Figure

COLOURS = {"ours": "#2f6fba", "trl": "#d1690e", "plain": "#7a7a7a"}
COLUMNS = 4

Group = tuple[str, str, float]
"""Task, side, learning rate."""


def write(curves: Sequence[Curve], directory: Path) -> None:
    """Write RESULTS.md and curves.png into ``directory``."""
    groups: dict[Group, list[Curve]] = defaultdict(list)
    for curve in curves:
        groups[curve.task, curve.side, curve.rate].append(curve)
    lines = [
        "# Held-out reward beside peers at equal rollouts",
        "",
        "Mean over seeds ± standard error. `area`: mean held-out reward over the run. `collapsed`: runs that kept less",
        "than half of their best gain. `stuck`: runs that stopped trying, with one answer to all rows, below 0.9.",
        "`cpu s`: processor time of a whole run of one thread.",
        "",
        "| task | rate | side | seeds | before | area | last | collapsed | stuck | cpu s |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(_row(group, groups[group]) for group in sorted(groups)),
        "",
        "## To the same reward",
        "",
        "Processor time until the highest held-out reward that both reach, in runs of the same rows, rate and seed:",
        "the mean over such pairs. A run's time is divided among its epochs as their wall time is.",
        "",
        "| task | rate | peer | pairs | reward | ours, cpu s | peer, cpu s | ratio |",
        "|---|---|---|---|---|---|---|---|",
        *_same_rewards(groups),
        "",
        "![curves](curves.png)",
        "",
    ]
    (directory / "RESULTS.md").write_text("\n".join(lines))
    _plot(groups, directory / "curves.png")


def _row(group: Group, curves: Sequence[Curve]) -> str:
    task, side, rate = group
    before = _spread([curve.points[0].heldout for curve in curves])
    area, last = _spread([curve.area for curve in curves]), _spread([curve.points[-1].heldout for curve in curves])
    seconds = statistics.mean(curve.cpu_seconds for curve in curves)
    collapsed = sum(curve.has_collapsed for curve in curves)
    stuck = sum(curve.is_stuck for curve in curves)
    cells = [task, f"{rate:g}", side, len(curves), before, area, last, collapsed, stuck, f"{seconds:.0f}"]
    return f"| {' | '.join(map(str, cells))} |"


def _same_rewards(groups: dict[Group, list[Curve]]) -> Iterator[str]:
    for task, side, rate in sorted(groups):
        ours = {curve.seed: curve for curve in groups.get((task, "ours", rate), ())}
        pairs = [(ours[peer.seed], peer) for peer in groups[task, side, rate] if peer.seed in ours and side != "ours"]
        if not pairs:
            continue
        rewards = [min(max(point.heldout for point in curve.points) for curve in pair) for pair in pairs]
        found = [[curve.cpu_seconds_to(reward) for curve in pair] for pair, reward in zip(pairs, rewards, strict=True)]
        own, peers = (statistics.mean(side) for side in zip(*found, strict=True))
        reward = f"{statistics.mean(rewards):.3f}"
        cells = [task, f"{rate:g}", side, len(pairs), reward, f"{own:.0f}", f"{peers:.0f}", f"{peers / own:.1f}"]
        yield f"| {' | '.join(map(str, cells))} |"


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values) / len(values) ** 0.5:.3f}"


def _plot(groups: dict[Group, list[Curve]], path: Path) -> None:
    panels = sorted({(task, rate) for task, _, rate in groups})
    height = math.ceil(len(panels) / COLUMNS)
    figure = Figure(figsize=(4 * COLUMNS, 3.2 * height), layout="constrained")
    grid = figure.subplots(height, COLUMNS, squeeze=False, sharey=True)
    for axis in grid.flat[len(panels) :]:
        axis.remove()
    for axis, (task, rate) in zip(grid.flat, panels, strict=False):
        axis.set(title=f"{task}, rate {rate:g}", xlabel="epochs", ylim=(-0.02, 1.02))
        for side, colour in COLOURS.items():
            for number, curve in enumerate(groups.get((task, side, rate), ())):
                epochs, rewards = [p.epoch for p in curve.points], [p.heldout for p in curve.points]
                axis.plot(epochs, rewards, color=colour, alpha=0.7, label=side if number == 0 else None)
        axis.legend()
    for axis in grid[:, 0]:
        axis.set_ylabel("held-out reward")
    figure.savefig(path, dpi=110)
