"""Which form a chat template's model writes calls in, and the parser of a reply."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nat_plugin_evsys.policy.tool_calls import ReplyParser, TextParser, ToolCallFormat, tool_call_id
from nat_plugin_evsys.policy.tool_forms.block_forms import DeepSeekForm, HermesForm, MistralForm, Qwen3XmlForm
from nat_plugin_evsys.policy.tool_forms.blocks import BlockForm, BlockParser, Thoughts
from nat_plugin_evsys.policy.tool_forms.harmony import HarmonyParser
from nat_plugin_evsys.policy.tool_forms.llama import Llama3JsonParser, PythonicParser

_MISTRAL_ID = 9


def form_of(template: str) -> ToolCallFormat | None:
    """The form that a chat template shows its model; None if it is none of the known ones."""
    if "<|channel|>" in template and "functions." in template:
        return "harmony"
    if "<function=" in template:
        return "qwen3_xml" if "<parameter=" in template else None
    if "<tool_call>" in template:
        return "hermes"
    if "[TOOL_CALLS]" in template:
        return "mistral"
    if "<｜tool▁calls▁begin｜>" in template:
        return "deepseek"
    if "[func_name1(" in template:
        return "pythonic"
    if "<|python_tag|>" in template or '{"name": function name, "parameters"' in template:
        return "llama3_json"
    return None


def create_parser(
    tool_format: ToolCallFormat | None,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    reply_id: str = "",
    thinking: bool = False,
    split_thoughts: bool = False,
) -> ReplyParser:
    """A parser for one reply.

    Args:
        tool_format: None looks for no calls.
        tools: the request's, in OpenAI form, for forms whose arguments have no types of their own; an empty list looks
            for no calls.
        reply_id: tool call ids are derived from it, so that parsing twice gives the same ids.
        thinking: the prompt ended inside a ``<think>`` block.
        split_thoughts: give thoughts out apart from the content (GPT-OSS's always are).
    """
    looks_for_calls = tools is None or len(tools) > 0
    if tool_format == "harmony":
        return HarmonyParser(tools=looks_for_calls, reply_id=reply_id)
    if looks_for_calls and tool_format == "llama3_json":
        return Llama3JsonParser(reply_id=reply_id)
    if looks_for_calls and tool_format == "pythonic":
        return PythonicParser(reply_id=reply_id)
    form = _block_form(tool_format, tools or ()) if looks_for_calls else None
    if form is None and not split_thoughts:
        return TextParser()
    call_id = _mistral_id if tool_format == "mistral" else tool_call_id
    return BlockParser(form, Thoughts(thinking, split_thoughts), reply_id=reply_id, call_id=call_id)


def _block_form(tool_format: ToolCallFormat | None, tools: Sequence[Mapping[str, Any]]) -> BlockForm | None:
    if tool_format == "hermes":
        return HermesForm()
    if tool_format == "qwen3_xml":
        return Qwen3XmlForm(tools)
    if tool_format == "mistral":
        return MistralForm()
    if tool_format == "deepseek":
        return DeepSeekForm()
    return None


def _mistral_id(reply_id: str, number: int) -> str:
    """Mistral's templates take ids of nine letters and digits only."""
    return tool_call_id(reply_id, number)[-_MISTRAL_ID:]
