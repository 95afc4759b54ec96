"""A "did you mean" below NAT's error about a YAML that misspells a ``_type``."""

from __future__ import annotations

import difflib
import logging
import re

_UNKNOWN_TAG = re.compile(r"Input tag '(?P<asked>[^']+)' found .* expected tags: (?P<names>.*)")
"""What pydantic says, and NAT logs, of a type that no package has registered."""


class TypeSuggestion(logging.Filter):
    """Adds the most similar name to NAT's log record; it never drops one."""

    def filter(self, record: logging.LogRecord) -> bool:
        """See logging.Filter."""
        lines = [record.getMessage()]
        for found in _UNKNOWN_TAG.finditer(lines[0]):
            names = re.findall(r"'([^']+)'", found["names"])
            suggestion = closest(found["asked"], [name.rpartition("/")[2] for name in names])
            if suggestion is not None:
                lines.append(f"Did you mean `_type: {suggestion}`?")
        record.msg, record.args = "\n".join(lines), ()
        return True


def closest(asked: str, names: list[str]) -> str | None:
    """The name that looks most like ``asked``, or None if none does; ``evsys_`` may be missing."""
    found = difflib.get_close_matches(asked, names, n=1) or difflib.get_close_matches(f"evsys_{asked}", names, n=1)
    return found[0] if found else None


def suggest_types() -> None:
    """Add suggestions to what NAT logs about unknown types, once."""
    logger = logging.getLogger("nat.utils.exception_handlers.schemas")
    if not any(isinstance(each, TypeSuggestion) for each in logger.filters):
        logger.addFilter(TypeSuggestion())
