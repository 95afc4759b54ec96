"""Function calls against the calls that are accepted, as the Berkeley Function Calling Leaderboard compares them.

Its AST checker (``bfcl_eval.eval_checker.ast_eval.ast_checker``) is the source of the rules. One differs: here a number
is compared by its value alone, so that 5.0 is an integer, as in JSON Schema.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

OMITTED = ""
"""Among an argument's accepted values: it may be omitted."""

_NOT_COMPARED = re.compile(r"[ ,./\-_*^]")


@dataclass(frozen=True, slots=True)
class Call:
    """A call that the agent made."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class AcceptedCall:
    """A wanted call: each argument with its accepted values."""

    name: str
    arguments: Mapping[str, Sequence[Any]]

    def to_json(self) -> dict[str, Any]:
        """From the data set's form."""
        return {self.name: {name: list(values) for name, values in self.arguments.items()}}


def why_calls_differ(calls: Sequence[Call], accepted: Sequence[AcceptedCall], *, ignore_order: bool) -> str | None:
    """None if every call is accepted and none is missing, else the first difference in words.

    Args:
        ignore_order: the calls may come in any order; each is then taken for the first accepted one that it fits.
    """
    if len(calls) != len(accepted):
        return f"{len(calls)} function calls, expected {len(accepted)}"
    left = list(calls)
    for wanted in accepted:
        candidates = left if ignore_order else left[:1]
        reasons = [why_call_differs(call, wanted) for call in candidates]
        if None not in reasons:
            same_name = (reason for call, reason in zip(candidates, reasons, strict=True) if call.name == wanted.name)
            return next(same_name, reasons[0])
        left.pop(reasons.index(None))
    return None


def why_call_differs(call: Call, wanted: AcceptedCall) -> str | None:
    """None if the call is accepted, else the first difference in words."""
    if call.name != wanted.name:
        return f"called `{call.name}`, expected `{wanted.name}`"
    for name, value in call.arguments.items():
        if name not in wanted.arguments:
            return f"`{call.name}` has no argument `{name}`"
        if not _is_accepted(value, wanted.arguments[name]):
            return f"argument `{name}` is {value!r}, expected one of {list(wanted.arguments[name])}"
    missing = [
        name for name, values in wanted.arguments.items() if name not in call.arguments and OMITTED not in values
    ]
    return f"argument `{missing[0]}` is missing" if missing else None


def _is_accepted(value: Any, accepted: Sequence[Any]) -> bool:
    return any(_is_same(value, each) for each in accepted)


def _is_same(value: Any, accepted: Any) -> bool:
    if isinstance(accepted, Mapping):
        return isinstance(value, Mapping) and _is_same_object(value, accepted)
    if isinstance(accepted, list):
        return isinstance(value, list) and len(value) == len(accepted) and all(map(_is_same, value, accepted))
    if isinstance(accepted, str):
        return isinstance(value, str) and _standardise(value) == _standardise(accepted)
    if isinstance(accepted, bool) or isinstance(value, bool):
        return value is accepted
    return bool(value == accepted)


def _is_same_object(value: Mapping[str, Any], accepted: Mapping[str, Any]) -> bool:
    """Within an accepted object each field has a list of accepted values too."""
    return all(key in accepted and _is_accepted(item, accepted[key]) for key, item in value.items()) and all(
        key in value or OMITTED in values for key, values in accepted.items()
    )


def _standardise(text: str) -> str:
    """ "April 1, 2024" and "April 1 2024" are one answer."""
    return _NOT_COMPARED.sub("", text).lower().replace("'", '"')
