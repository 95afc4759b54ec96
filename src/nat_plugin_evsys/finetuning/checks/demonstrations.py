"""Whether the demonstrations of a warm start begin as the workflow's own prompts do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nat_plugin_evsys.report.findings import quoted
from nat_plugin_evsys.rollouts.attempts import Attempt

Messages = Sequence[Mapping[str, Any]]


class PromptCheck:
    """Compares the system prompt of the demonstrations with the one that the first rollouts sent, once.

    Args:
        demonstrations: the messages of each; none makes a check that never says anything.
    """

    def __init__(self, demonstrations: Sequence[Messages]) -> None:
        self._openings = [_system_prompt(messages) for messages in demonstrations]

    def compare(self, attempts: Sequence[Attempt]) -> str | None:
        """The sentence to show where they differ; None where they agree, after the first comparison, or without calls.

        Nothing is said where the workflow's system prompt differs from row to row: a demonstration may be of any row.
        """
        sent = {_system_prompt(attempt.calls[0].messages) for attempt in attempts if attempt.calls}
        openings = self._openings
        if not sent:
            return None
        self._openings = []
        if len(sent) > 1:
            return None
        (prompt,) = sent
        others = [opening for opening in openings if opening != prompt]
        if not others:
            return None
        return (
            f"{len(others)} of {len(openings)} demonstrations of the warm start begin otherwise than the workflow: one "
            f"{_begins(others[0])}, what the workflow sends {_begins(prompt)}. They teach replies to prompts that are "
            "never sent; give warm_start.demonstrations the messages that the workflow sends (`nat evsys rollouts` "
            "shows them)"
        )


def _begins(prompt: str | None) -> str:
    return "has no system prompt" if prompt is None else f"has the system prompt {quoted(_first_line(prompt), 80)}"


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[0]


def _system_prompt(messages: Messages) -> str | None:
    """The text of the first message if it is the system's (or the developer's), without the spaces around it."""
    if not messages or messages[0].get("role") not in ("system", "developer"):
        return None
    content = messages[0].get("content")
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) for part in content)
    return str(content or "").strip()
