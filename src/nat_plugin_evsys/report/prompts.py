"""How many prompts of later turns start with the recorded ids of the turn before; see ``PromptHistory``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from nat_plugin_evsys.calls import PromptHistory

TOKENISED_AGAIN = (PromptHistory.CHANGED, PromptHistory.REWRITTEN)


def extended_share(prompts: Mapping[str, int]) -> float | None:
    """The share among the prompts that follow a recorded turn, or None if none does."""
    extended = prompts.get(PromptHistory.EXTENDED, 0)
    later = extended + sum(prompts.get(name, 0) for name in TOKENISED_AGAIN)
    return extended / later if later else None


def total_prompts(rows: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """The counts of all rows of ``metrics.jsonl`` together; {} if no row has any."""
    total: Counter[str] = Counter()
    for row in rows:
        total.update(row.get("prompts") or {})
    return dict(total)
