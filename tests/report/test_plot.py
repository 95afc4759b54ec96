"""The reward plot: what is drawn, and that nothing else of matplotlib is touched."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread

from nat_plugin_evsys.report.plot import TRAINING_COLOUR, VALIDATION_COLOUR, plot_rewards

ROWS: list[dict[str, Any]] = [
    {"event": "validation", "epoch": 0, "reward": 0.1},
    {"event": "epoch", "epoch": 1, "reward_mean": 0.2, "reward_std": 0.3, "reward_min": 0.0, "reward_max": 0.4},
    {"event": "epoch", "epoch": 2, "reward_mean": None},
    {"event": "epoch", "epoch": 3, "reward_mean": 0.6, "reward_std": 0.2, "reward_min": 0.1, "reward_max": 1.0},
    {"event": "validation", "epoch": 3, "reward": 0.7},
    {"event": "warm_start", "epoch": 0, "loss": 2.0},
]


def has_colour(path: Path, colour: str) -> bool:
    """Any pixel within a small distance of the colour."""
    wanted = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    image = imread(path)[:, :, :3]
    return bool((np.abs(image - wanted).max(axis=-1) < 0.02).any())


def test_draws_both_curves_on_labelled_axes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Axes] = []
    original = Figure.savefig

    def spy(self: Figure, *args: Any, **kwargs: Any) -> None:
        drawn.extend(self.axes)
        original(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", spy)
    path = tmp_path / "rewards.png"
    plot_rewards(ROWS, path)
    assert has_colour(path, TRAINING_COLOUR)
    assert has_colour(path, VALIDATION_COLOUR)
    (axes,) = drawn
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("epochs trained", "reward")
    training, heldout = axes.get_lines()
    assert list(zip(*training.get_data(), strict=True)) == [(0, 0.2), (2, 0.6)]
    assert list(zip(*heldout.get_data(), strict=True)) == [(0, 0.1), (3, 0.7)]
    (band,) = axes.collections
    corners = {(float(x), round(float(y), 6)) for x, y in band.get_paths()[0].vertices}
    assert corners == {(0, 0.0), (0, 0.4), (2, 0.4), (2, 0.8)}  # one deviation, within what was seen
    assert imread(path).shape[:2] == (600, 1050)


def test_the_legend_is_outside_the_axes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    original = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), original(self, *a, **k))[1])
    plot_rewards([*ROWS, {"event": "base", "epoch": 0, "reward": 0.0}], tmp_path / "rewards.png")
    (figure,) = figures
    (legend,), (axes,) = figure.legends, figure.axes
    assert len(legend.get_texts()) == 4
    assert not legend.get_window_extent().overlaps(axes.get_window_extent())
    assert figure.bbox.containsx(legend.get_window_extent().x0)
    assert figure.bbox.containsx(legend.get_window_extent().x1)


def test_without_validation_only_the_training_curve(tmp_path: Path) -> None:
    path = tmp_path / "rewards.png"
    plot_rewards([row for row in ROWS if row["event"] == "epoch"], path)
    assert has_colour(path, TRAINING_COLOUR)
    assert not has_colour(path, VALIDATION_COLOUR)


def test_no_rows_is_a_picture_too(tmp_path: Path) -> None:
    path = tmp_path / "rewards.png"
    plot_rewards([], path)
    assert not has_colour(path, TRAINING_COLOUR)


def test_a_failed_write_leaves_the_old_picture_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rewards.png"
    plot_rewards(ROWS, path)
    before = path.read_bytes()

    def full(*_args: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("nat_plugin_evsys.files.os.replace", full)
    with pytest.raises(OSError, match="disk full"):
        plot_rewards(ROWS[:2], path)
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["rewards.png"]


def test_pyplot_is_neither_imported_nor_switched(tmp_path: Path) -> None:
    code = (
        "import sys, matplotlib\nfrom pathlib import Path\nfrom nat_plugin_evsys.report.plot import plot_rewards\n"
        "matplotlib.rcParams['backend'] = 'svg'\n"
        "plot_rewards([{'event': 'epoch', 'epoch': 1, 'reward_mean': 1.0}], Path(sys.argv[1]))\n"
        "print('matplotlib.pyplot' in sys.modules, matplotlib.rcParams['backend'])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "rewards.png")]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "False svg"
