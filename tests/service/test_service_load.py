"""Clients that are killed at random: nothing is lost, doubled or reordered (a small ``load_check``)."""

from __future__ import annotations

from pathlib import Path

from load_check import check


def test_log_of_killed_clients_replays_to_the_servers_weights(tmp_path: Path) -> None:
    summary = check(clients=2, operations=25, kills=1, seed=1, root=tmp_path)

    assert summary["wrong"] == []
    assert summary["sent"] == 50
    assert summary["kills"] >= 1
    assert summary["replayed_equal"] == summary["models"] >= 3
