"""A dataset's values as data frames hold them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def is_absent(value: Any) -> bool:
    """Whether the row has no such value: None, or the NaN that fills a gap beside rows that have one."""
    return value is None or (isinstance(value, float) and value != value)


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
