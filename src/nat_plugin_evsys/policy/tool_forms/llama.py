"""Llama's forms: a reply is either text or calls, which only its end decides."""

from __future__ import annotations

import ast
import re
import warnings
from typing import Any

from nat_plugin_evsys.policy.tool_calls import SPACE, Function, Piece, ToolCall, tool_call_id
from nat_plugin_evsys.policy.tool_forms.functions import function_of, json_function, json_prefix

_CONSTANTS = {"true": True, "false": False, "null": None}


class _WholeReply:
    """Holds back a reply that opens like calls."""

    _TAGS: tuple[str, ...] = ()
    _OPENS = ""

    def __init__(self, *, reply_id: str = "") -> None:
        self.malformed = 0
        self._reply_id = reply_id
        self._text = ""
        self._plain = False

    def feed(self, text: str) -> list[Piece]:
        """The text as soon as it cannot be tool calls."""
        if self._plain:
            return [text] if text else []
        self._text += text
        start = self._text.lstrip(SPACE)
        if (
            not start
            or start.startswith((self._OPENS, *self._TAGS))
            or any(tag.startswith(start) for tag in self._TAGS)
        ):
            return []
        self._plain = True
        return [self._text]

    def finish(self) -> list[Piece]:
        """The tool calls, or the text when it was none."""
        if self._plain:
            return []
        text = self._text.strip(SPACE)
        for tag in self._TAGS:
            text = text.removeprefix(tag).removesuffix(tag)
        functions = self._functions(text.strip(SPACE))
        if functions:
            return [ToolCall(tool_call_id(self._reply_id, n), *function) for n, function in enumerate(functions)]
        self.malformed += self._looks_like_calls(self._text)
        return [self._text] if self._text else []

    def _functions(self, text: str) -> list[Function]:
        raise NotImplementedError

    def _looks_like_calls(self, text: str) -> bool:
        raise NotImplementedError


class Llama3JsonParser(_WholeReply):
    """``{"name": …, "parameters": {…}}``, several separated by ``;``, perhaps behind ``<|python_tag|>``."""

    _TAGS = ("<|python_tag|>",)
    _OPENS = "{"

    def _functions(self, text: str) -> list[Function]:
        functions = []
        while True:
            value, end = json_prefix(text)
            function = json_function(value, bare=False)  # an answer in JSON may have a name too
            if function is None:
                return []
            functions.append(function)
            text = text[end:].lstrip(SPACE)
            if not text:
                return functions
            if not text.startswith(";"):
                return []
            text = text[1:]

    def _looks_like_calls(self, text: str) -> bool:
        return self._TAGS[0] in text or ('"name"' in text and ('"parameters"' in text or '"arguments"' in text))


class PythonicParser(_WholeReply):
    """``[name(key=value), …]`` with literal values, for Llama 4 between ``<|python_start|>`` and ``<|python_end|>``."""

    _TAGS = ("<|python_start|>", "<|python_end|>")
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
