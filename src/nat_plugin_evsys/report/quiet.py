"""NAT's own progress bars, silenced while our display shows the same rollouts."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

BARS = (
    ("nat.plugins.eval.runtime.evaluate", "tqdm"),
    ("nat.plugins.eval.evaluator.base_evaluator", "_tqdm"),
)
"""The module globals through which NAT 1.9's evaluation makes its bars ("Running workflow" and each evaluator's)."""

_lock = threading.Lock()
_depth = 0
_originals: list[tuple[ModuleType, str, Any]] = []


@contextmanager
def quiet_tqdm() -> Iterator[None]:
    """Within it NAT's evaluation bars print nothing; every other use of tqdm is untouched.

    May be nested and entered from several tasks; the last one to leave puts the bars back.
    """
    global _depth
    with _lock:
        if _depth == 0:
            _silence()
        _depth += 1
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                _restore()


def _silence() -> None:
    for module_name, name in BARS:
        module = importlib.import_module(module_name)
        bar = getattr(module, name, None)
        if isinstance(bar, type):  # None where tqdm is not installed
            _originals.append((module, name, bar))
            setattr(module, name, _disabled(bar))


def _restore() -> None:
    while _originals:
        module, name, bar = _originals.pop()
        setattr(module, name, bar)


def _disabled(bar: type) -> type:
    original: Any = bar

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original.__init__(self, *args, **{**kwargs, "disable": True})

    # Each class of tqdm's has a monitor thread of its own, which never ends.
    return type("QuietTqdm", (bar,), {"__init__": init, "monitor_interval": 0})
