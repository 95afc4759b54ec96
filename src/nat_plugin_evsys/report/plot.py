"""``rewards.png``: reward over epochs, from the rows of ``metrics.jsonl``."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from nat_plugin_evsys.files import atomic_write
from nat_plugin_evsys.report.metrics_log import BASE, EPOCH, VALIDATION

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, Any]

TRAINING_COLOUR = "#2f6fba"
BASE_COLOUR = "#7a7a7a"
VALIDATION_COLOUR = "#d1690e"


def plot_rewards(rows: Iterable[Row], path: Path, title: str = "Reward") -> None:
    """Draw the training reward (mean and standard deviation over rollouts) and the held-out reward to a PNG.

    The x-axis is the number of epochs that the policy has been trained for: the rollouts of epoch k come from a policy
    with k-1 epochs behind it. So both curves show the same policy at the same place.

    Args:
        rows: rows of a MetricsLog; ``epoch`` rows give ``reward_mean`` (and ``reward_std``, ``reward_min``,
            ``reward_max``), ``validation`` rows give ``reward``. Rows without a number are left out.
        path: replaced as a whole.

    Raises:
        OSError: ``path`` cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: a user's own backend and figures stay as they are
    axes = figure.add_subplot()
    kept = list(rows)
    _draw_training(axes, kept)
    _draw_validation(axes, kept)
    _label(axes, title)
    image = io.BytesIO()
    figure.savefig(image, format="png", metadata={"Software": None})
    atomic_write(path, image.getvalue())


def _draw_training(axes: Axes, rows: list[Row]) -> None:
    points = [row for row in rows if row.get("event") == EPOCH and _number(row.get("reward_mean"))]
    if not points:
        return
    x = [row["epoch"] - 1 for row in points]
    banded = [row for row in points if _number(row.get("reward_std"))]
    if banded:
        axes.fill_between(
            [row["epoch"] - 1 for row in banded],
            [_clipped(row, -1) for row in banded],
            [_clipped(row, +1) for row in banded],
            color=TRAINING_COLOUR,
            alpha=0.15,
            linewidth=0,
            label="training, one standard deviation",
        )
    axes.plot(x, [row["reward_mean"] for row in points], "o-", color=TRAINING_COLOUR, label="training, mean")


def _draw_validation(axes: Axes, rows: list[Row]) -> None:
    base = [row["reward"] for row in rows if row.get("event") == BASE and _number(row.get("reward"))]
    if base:
        axes.plot([0] * len(base), base, "s", color=BASE_COLOUR, label="held-out, base model")
    points = [row for row in rows if row.get("event") == VALIDATION and _number(row.get("reward"))]
    if points:
        axes.plot(
            [row["epoch"] for row in points],
            [row["reward"] for row in points],
            "s--",
            color=VALIDATION_COLOUR,
            label="held-out, mean",
        )


def _label(axes: Axes, title: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title)
    axes.set_xlabel("epochs trained")
    axes.set_ylabel("reward")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    if handles:  # below the axes, where it hides no point
        axes.figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize="small")
    else:
        axes.text(0.5, 0.5, "no reward yet", ha="center", va="center", transform=axes.transAxes)


def _clipped(row: Row, sign: int) -> float:
    """One standard deviation from the mean, limited to the observed range."""
    edge: float = row["reward_mean"] + sign * row["reward_std"]
    low, high = row.get("reward_min"), row.get("reward_max")
    if _number(low):
        edge = max(edge, low)
    return min(edge, high) if _number(high) else edge


def _number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)
