"""Token ids as requests send them."""

from __future__ import annotations

from typing import Any

END_OF_IDS = 2**31
"""No vocabulary is as large, and tokenizers take no larger numbers."""


def are_token_ids(value: Any) -> bool:
    """Whether a value of JSON is a list of token ids, which is not empty. True is an int too, and no id."""
    return bool(
        value and isinstance(value, list) and all(type(token) is int and 0 <= token < END_OF_IDS for token in value)
    )
