"""NAT's own progress bars, silenced while our display shows the same rollouts."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

from nat_plugin_evsys.overlapping import entered_once

BARS = (
    ("nat.plugins.eval.runtime.evaluate", "tqdm"),
    ("nat.plugins.eval.evaluator.base_evaluator", "_tqdm"),
)
"""The module globals through which NAT 1.9's evaluation makes its bars ("Running workflow" and each evaluator's)."""


@entered_once
def quiet_tqdm() -> Iterator[None]:
    """Within it NAT's evaluation bars print nothing; every other use of tqdm is untouched."""
    originals = []
    for module_name, name in BARS:
        module = importlib.import_module(module_name)
        bar = getattr(module, name, None)
        if isinstance(bar, type):  # None where tqdm is not installed
            originals.append((module, name, bar))
            setattr(module, name, _disabled(bar))
    try:
        yield
    finally:
        for module, name, bar in originals:
            setattr(module, name, bar)


def _disabled(bar: type) -> type:
    original: Any = bar

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original.__init__(self, *args, **{**kwargs, "disable": True})

    # Each class of tqdm's has a monitor thread of its own, which never ends.
    return type("QuietTqdm", (bar,), {"__init__": init, "monitor_interval": 0})
