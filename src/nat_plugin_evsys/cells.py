"""A dataset's values as data frames hold them."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

_GAPS = frozenset({"NaTType", "NAType"})
"""The types of pandas' NaT and NA, of which there is one value each; pandas itself takes long to import."""


def is_absent(value: Any) -> bool:
    """Whether the row has no such value: None, or what fills a gap beside rows that have one (NaN, NaT, NA)."""
    return value is None or type(value).__name__ in _GAPS or (isinstance(value, Real) and value != value)


def is_blank(value: Any) -> bool:
    """Whether there is nothing in it: absent, or a text of spaces alone. 0, False and an empty list are values."""
    return is_absent(value) or (isinstance(value, str) and not value.strip())


def without_arrays(value: Any) -> Any:
    """``value`` with NumPy's arrays, which are the lists of a .parquet file, as lists at every depth."""
    if isinstance(value, Mapping):
        return {key: without_arrays(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    return [without_arrays(item) for item in value] if isinstance(value, list) else value
