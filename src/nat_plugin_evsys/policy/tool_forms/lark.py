"""A grammar in the making, in llguidance's dialect of Lark.

JSON is written as the chat templates write it in the history: one line, ``", "`` and ``": "`` between its parts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

_JSON = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "lenient": True}
_ANY = "/(?s:.*)/"


class Lark:
    """Collects rules. What its methods return is part of a rule's body.

    Args:
        special_id: the id of a marker that is one control token; None for plain text.

    Attributes:
        unheld: what of the schemas has no effect, as a person reads it.
    """

    def __init__(self, special_id: Callable[[str], int | None]) -> None:
        self._special_id = special_id
        self._rules: list[str] = []
        self.unheld: list[str] = []

    def rule(self, name: str, body: str, *, option: str = "") -> str:
        """A rule's name; an upper-case ``name`` makes a terminal, whose body has regular expressions only."""
        name = f"{name}_{len(self._rules)}"
        self._rules.append(f"{name}{option}: {body}")
        return name

    def any_of(self, *bodies: str) -> str:
        """One of them."""
        return bodies[0] if len(bodies) == 1 else f"({' | '.join(bodies)})"

    def series(self, item: str, between: str, several: bool) -> str:
        """One item, or with ``several`` any number."""
        return f"{item} ({between} {item})*" if several else item

    def json(self, schema: dict[str, Any]) -> str:
        """A JSON value of a schema."""
        return self.rule("json", "%json " + json.dumps({**schema, "x-guidance": _JSON}))

    def is_special(self, marker: str) -> bool:
        """Whether a marker is one control token."""
        return self._special_id(marker) is not None

    def marker(self, text: str) -> str:
        """A marker, as its id where it is one control token."""
        special = self._special_id(text)
        return literal(text) if special is None else f"<[{special}]>"

    def text(self, *, without: Sequence[str] = (), not_first: Sequence[str] = ()) -> str:
        """Any text, which may be empty.

        Args:
            without: what it may not contain.
            not_first: what it may not begin with, after white space.
        """
        body = _ANY
        if without:
            body += f" & ~/(?s:.*){_one_of(without)}(?s:.*)/"
        if not_first:
            body += f" & ~/[ \\t\\r\\n]*{_one_of(not_first)}(?s:.*)/"
        return self.rule("TEXT", body)

    def text_until(self, marker: str, *, without: Sequence[str] = ()) -> str:
        """Any text and then a marker."""
        if self.is_special(marker):
            return f"{self.text(without=(*without, marker))} {self.marker(marker)}"
        text = self.text(without=without)
        return self.rule("until", f"{text} {literal(marker)}", option="[lazy]")

    def text_of_length(self, shortest: int, longest: int | None, end: str) -> str:
        """Text of so many characters, and ``end``, whose last line it does not contain."""
        length = f"{shortest},{'' if longest is None else longest}"
        last = end.rpartition("\n")[2]
        body = f"/(?s:.{{{length}}}){pattern(end)}/ & ~/(?s:.*){pattern(last)}(?s:.+)/"
        return self.rule("value", self.rule("VALUE", body), option="[lazy]")

    def grammar(self, start: str) -> str:
        """All of it."""
        return "\n".join([f"start: {start}", *self._rules]) + "\n"


def literal(text: str) -> str:
    """The text itself; nothing at all for no text."""
    return json.dumps(text, ensure_ascii=False) if text else ""


def pattern(text: str) -> str:
    """The text itself, within a regular expression between slashes."""
    return re.escape(text).replace("/", "\\/").replace("\\\n", "\\n")


def _one_of(texts: Sequence[str]) -> str:
    return f"({'|'.join(map(pattern, texts))})"
