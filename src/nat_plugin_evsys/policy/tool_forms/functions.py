"""The names and arguments of calls that models write as JSON, with the liberties that they take."""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

from nat_plugin_evsys.policy.tool_calls import Function

_ESCAPED = re.compile(r"\\.", re.DOTALL)
_DECODER = json.JSONDecoder(strict=False, parse_constant=lambda name: _refuse(name))


def json_functions(text: str, *, bare: bool = True) -> list[Function] | None:
    """The calls in a JSON object or a list of them, or None if it is neither, or one of them is no call.

    Line ends within strings are taken, and keys beside name and arguments ignored.

    Args:
        bare: an object without arguments is a call too.
    """
    value = json_value(text)
    functions = [json_function(item, bare=bare) for item in (value if isinstance(value, list) else [value])]
    calls = [function for function in functions if function is not None]
    return calls if calls and len(calls) == len(functions) else None


def json_function(value: Any, *, bare: bool = True) -> Function | None:
    """The call that ``{"name": …, "arguments": …}`` is, or None.

    ``parameters`` stands for ``arguments`` too, and JSON text for the object in it. Arguments that have no JSON form
    (a lone surrogate, a number beyond a float's range) make no call: whoever reads the reply could not parse them.
    """
    if not isinstance(value, dict) or not isinstance(name := value.get("name"), str) or not name:
        return None
    given = [value[key] for key in ("arguments", "parameters") if key in value]
    if not given and not bare:
        return None
    arguments = given[0] if given else None
    if isinstance(arguments, str):
        arguments = json_value(arguments) if arguments.strip() else {}
    return function_of(name, {} if arguments is None else arguments)


def function_of(name: str, arguments: Any) -> Function | None:
    """A call as OpenAI has it, or None if the arguments are not an object with a JSON form."""
    if not isinstance(arguments, dict):
        return None
    try:
        written = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        (name + written).encode()
    except (ValueError, TypeError, RecursionError):
        return None
    return name, written


def json_value(text: str) -> Any:
    """The JSON value that ``text`` is, or None."""
    value, end = json_prefix(text)
    return None if text[end:].strip() else value


def json_prefix(text: str) -> tuple[Any, int]:
    """The JSON value that ``text`` begins with and where it ends, or (None, 0)."""
    start = len(text) - len(text.lstrip())
    try:
        return _DECODER.raw_decode(text, start)
    except (ValueError, RecursionError):
        return None, 0


def ends_in_string(text: str) -> bool:
    """Whether JSON text that is not complete ends within a string."""
    return _ESCAPED.sub("", text).count('"') % 2 == 1


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")  # json would take NaN and Infinity
