"""What a dataset row asks, as a person reads it."""

from __future__ import annotations

import json
from typing import Any

_NAMES = ("question", "query", "input", "prompt", "text", "message", "task")
"""Fields that hold the question where a row is an object, the likeliest first."""


def question_text(question: Any) -> str | None:
    """The question of a row that is an object, or JSON of one; None where there is nothing shorter to say than the row.

    It is the text of the field that is called so, else the object's longest text.
    """
    row = _object(question)
    if row is None:
        return None
    texts = {name: value for name, value in row.items() if isinstance(value, str) and value.strip()}
    named = next((texts[name] for name in _NAMES if name in texts), None)
    return named or max(texts.values(), key=len, default=None)


def _object(question: Any) -> dict[str, Any] | None:
    if isinstance(question, str) and question.lstrip().startswith("{"):
        try:
            question = json.loads(question)
        except ValueError:
            return None
    return question if isinstance(question, dict) else None
