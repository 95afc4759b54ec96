"""The block forms: Hermes, Qwen3-Coder's XML, Mistral's and DeepSeek's.

What is taken is what vLLM's parsers of the same families take
(https://docs.vllm.ai/en/latest/features/tool_calling.html), and the liberties in ``functions``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from nat_plugin_evsys.policy.tool_calls import Function
from nat_plugin_evsys.policy.tool_forms.blocks import MORE, Block
from nat_plugin_evsys.policy.tool_forms.functions import (
    function_of,
    json_function,
    json_functions,
    json_prefix,
    json_value,
)

_ESCAPED = re.compile(r"\\.", re.DOTALL)


class HermesForm:
    """``<tool_call>JSON</tool_call>``; at the end of the reply the closing marker may be missing."""

    opens: Sequence[str] = ("<tool_call>",)
    _CLOSE = "</tool_call>"

    def read(self, opening: str, text: str, final: bool) -> Block | Literal["more"] | None:
        """See ``BlockForm``."""
        end = text.find(self._CLOSE)
        while end >= 0:
            functions = json_functions(text[:end])
            if functions is not None:
                return functions, end + len(self._CLOSE)
            if not _ends_in_string(text[:end]):
                return None
            end = text.find(self._CLOSE, end + 1)  # this one belongs to an argument
        if not final:
            return MORE
        functions = json_functions(text)
        return None if functions is None else (functions, len(text))


class Qwen3XmlForm:
    """``<function=NAME>`` with ``<parameter=KEY>`` elements; the ``<tool_call>`` around it may be missing.

    Args:
        tools: in OpenAI form. A parameter that its schema calls a string is taken as it is; others are read as JSON if
            they are that.
    """

    opens: Sequence[str] = ("<tool_call>", "<function=")
    _FUNCTION = re.compile(r"([^>\s]+)>(.*?)</function>", re.DOTALL)
    _PARAMETER = re.compile(r"<parameter=([^>\s]+)>(.*?)</parameter>", re.DOTALL)
    _CLOSE = "</tool_call>"

    def __init__(self, tools: Sequence[Mapping[str, Any]]) -> None:
        self._types = {
            tool["function"]["name"]: {
                key: schema.get("type")
                for key, schema in ((tool["function"].get("parameters") or {}).get("properties") or {}).items()
                if isinstance(schema, dict)
            }
            for tool in tools
        }

    def read(self, opening: str, text: str, final: bool) -> Block | Literal["more"] | None:
        """See ``BlockForm``."""
        start = 0
        if opening == "<tool_call>":
            start = len(text) - len(text.lstrip())
            marker = "<function="
            if not text.startswith(marker, start):
                return MORE if not final and marker.startswith(text[start:]) else None
            start += len(marker)
        if "</function>" not in text[start:]:
            return None if final else MORE
        match = self._FUNCTION.match(text, start)
        if match is None or (function := self._function(match[1], match[2])) is None:
            return None
        rest = text[match.end() :].lstrip()
        if not final and len(rest) < len(self._CLOSE) and self._CLOSE.startswith(rest):
            return MORE
        closed = rest.startswith(self._CLOSE)
        return [function], len(text) - len(rest) + len(self._CLOSE) if closed else match.end()

    def _function(self, name: str, body: str) -> Function | None:
        if self._PARAMETER.sub("", body).strip():
            return None
        types = self._types.get(name, {})
        arguments = {}
        for key, text in self._PARAMETER.findall(body):
            text = text.removeprefix("\n").removesuffix("\n")
            value = None if types.get(key) == "string" else json_value(text)
            arguments[key] = text if value is None and text.strip() != "null" else value
        return function_of(name, arguments)


class MistralForm:
    """``[TOOL_CALLS]`` before a list of calls as JSON, or before ``name{…}``, which may repeat (tokenizers v11+)."""

    opens: Sequence[str] = ("[TOOL_CALLS]",)
    _NAME = re.compile(r"\s*([\w.-]+)(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?(?=\s*\{)")

    def read(self, opening: str, text: str, final: bool) -> Block | Literal["more"] | None:
        """See ``BlockForm``."""
        if not final and not text.strip():
            return MORE
        if text.lstrip().startswith(("[", "{")):
            value, end = json_prefix(text)
            functions = [json_function(item) for item in (value if isinstance(value, list) else [value])]
        else:
            match = self._NAME.match(text)
            value, end = json_prefix(text[match.end() :]) if match else (None, 0)
            end += match.end() if match and end else 0
            functions = [function_of(match[1], value) if match else None]
        if not end and not final:
            return MORE  # the marker is a token of its own, so what follows is a call if it ever ends
        calls = [function for function in functions if function is not None]
        return (calls, end) if end and calls and len(calls) == len(functions) else None


class DeepSeekForm:
    """``<｜tool▁calls▁begin｜>`` around calls; V3 and R1 write the type first and a fenced block, V3.1 neither."""

    opens: Sequence[str] = ("<｜tool▁calls▁begin｜>",)
    _CLOSE = "<｜tool▁calls▁end｜>"
    _CALL = re.compile(
        r"\s*<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>)?\s*([^\s<｜]+)\s*(?:<｜tool▁sep｜>|\n)\s*"
        r"(?:```json\s*)?(.*?)(?:\s*```)?\s*<｜tool▁call▁end｜>\s*",
        re.DOTALL,
    )

    def read(self, opening: str, text: str, final: bool) -> Block | Literal["more"] | None:
        """See ``BlockForm``."""
        end = text.find(self._CLOSE)
        if end < 0 and not final:
            return MORE
        block = text if end < 0 else text[:end]
        functions: list[Function] = []
        at = 0
        while match := self._CALL.match(block, at):
            function = function_of(match[1], json_value(match[2]))
            if function is None:
                return None
            functions.append(function)
            at = match.end()
        if not functions or block[at:].strip():
            return None
        return functions, len(text) if end < 0 else end + len(self._CLOSE)


def _ends_in_string(text: str) -> bool:
    """Whether JSON text that is not complete ends within a string."""
    return _ESCAPED.sub("", text).count('"') % 2 == 1
