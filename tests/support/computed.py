"""Metrics without what is measured."""

from __future__ import annotations

from collections.abc import Mapping


def computed(metrics: Mapping[str, float]) -> dict[str, float]:
    """All but the process's memory, which is never the same twice."""
    return {name: value for name, value in metrics.items() if name != "memory_peak_bytes:max"}
