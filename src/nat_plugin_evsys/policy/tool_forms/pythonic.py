"""``[name(key=value), …]`` is the whole reply: Llama 3.2 and 4 with a template of this form."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

from nat_plugin_evsys.policy.tool_calls import Function, ReplyParser, ToolCallFormat
from nat_plugin_evsys.policy.tool_forms.blocks import Thoughts
from nat_plugin_evsys.policy.tool_forms.form import Tool, ToolForm, inexpressible, parameters_of
from nat_plugin_evsys.policy.tool_forms.functions import function_of
from nat_plugin_evsys.policy.tool_forms.lark import Lark, literal
from nat_plugin_evsys.policy.tool_forms.schemas import Parameter, parameters, without_null
from nat_plugin_evsys.policy.tool_forms.whole_reply import WholeReply

_CONSTANTS = {"true": True, "false": False, "null": None}
_TAGS = ("<|python_start|>", "<|python_end|>")


class PythonicForm(ToolForm):
    """Values are literals; for Llama 4 all stands between ``<|python_start|>`` and ``<|python_end|>``."""

    name: ClassVar[ToolCallFormat] = "pythonic"
    no_beginning = ("[", _TAGS[0])

    @staticmethod
    def is_shown_by(template: str) -> bool:
        """See ``ToolForm``."""
        return "[func_name1(" in template

    def parser(self, tools: Sequence[Tool], reply_id: str, thoughts: Thoughts) -> ReplyParser:
        """See ``ToolForm``."""
        return _Parser(reply_id=reply_id)

    def calls(self, lark: Lark, tools: Sequence[Tool], *, several: bool) -> str:
        """See ``ToolForm``. Only declared parameters can be written. Literals are JSON's, which Python reads too, but
        for the constants."""
        call = lark.any_of(*(lark.rule("call", _call(lark, tool)) for tool in tools))
        return f'"[" {lark.series(call, literal(", "), several)} "]"'


def _call(lark: Lark, tool: Tool) -> str:
    known = parameters(parameters_of(tool))
    for name in (tool["name"], *(each.name for each in known)):
        if not _is_name(name):
            raise inexpressible(f"{name!r} is no name in Python")
    # What may follow, from the last parameter to the first, where none is written yet and where one is.
    first = more = ""
    for parameter in reversed(known):
        written = lark.rule("argument", f"{literal(parameter.name + '=')} {_argument(lark, parameter)}")
        begun = lark.rule("first", f"{written} {more}" + ("" if parameter.required else f" | {first}"))
        more = lark.rule("more", f"{literal(', ')} {written} {more}" + ("" if parameter.required else f" | {more}"))
        first = begun
    return f'{literal(tool["name"] + "(")} {first} ")"'


def _argument(lark: Lark, parameter: Parameter) -> str:
    schema, nullable = without_null(parameter.schema)
    is_bool = schema.get("type") == "boolean" and "enum" not in schema and "const" not in schema
    values = ['"True"', '"False"'] if is_bool else [lark.json(schema)]
    return lark.any_of(*values, *(['"None"'] if nullable else []))


def _is_name(name: str) -> bool:
    """Whether Python reads the name of a function or parameter as it is written."""
    try:
        return name.isidentifier() and ast.unparse(ast.parse(f"{name}({name}=0)")) == f"{name}({name}=0)"
    except (SyntaxError, ValueError):
        return False


class _Parser(WholeReply):
    _TAGS = _TAGS
    _OPENS = "["
    _CALL = re.compile(r"^\s*(?:<\|python_start\|>)?\s*\[\s*[A-Za-z_][\w.]*\(")

    def _functions(self, text: str) -> list[Function]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of escapes that Python does not know
                body = ast.parse(text, mode="eval").body
            calls = body.elts if isinstance(body, ast.List) else []
            functions = [_pythonic(call) for call in calls]
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return []
        found = [function for function in functions if function is not None]
        return found if len(found) == len(functions) else []

    def _looks_like_calls(self, text: str) -> bool:
        return self._CALL.match(text) is not None


def _pythonic(call: ast.expr) -> Function | None:
    if not isinstance(call, ast.Call) or call.args or any(keyword.arg is None for keyword in call.keywords):
        return None
    return function_of(ast.unparse(call.func), {str(each.arg): _literal(each.value) for each in call.keywords})


def _literal(node: ast.expr) -> Any:
    """A literal's value; ``true``, ``false`` and ``null`` are JSON's."""
    if isinstance(node, ast.Name) and node.id in _CONSTANTS:
        return _CONSTANTS[node.id]
    if isinstance(node, ast.List):
        return [_literal(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        return {
            ast.literal_eval(key): _literal(value) for key, value in zip(node.keys, node.values, strict=True) if key
        }
    return ast.literal_eval(node)
