"""The forms of the model families: which one a chat template shows, and the parser of a reply."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nat_plugin_evsys.policy.tool_calls import ReplyParser
from nat_plugin_evsys.policy.tool_forms.blocks import Thoughts
from nat_plugin_evsys.policy.tool_forms.deepseek import DeepSeekForm
from nat_plugin_evsys.policy.tool_forms.form import ToolForm, plain_parser
from nat_plugin_evsys.policy.tool_forms.harmony import HarmonyForm
from nat_plugin_evsys.policy.tool_forms.hermes import HermesForm
from nat_plugin_evsys.policy.tool_forms.llama_json import Llama3JsonForm
from nat_plugin_evsys.policy.tool_forms.mistral import MistralForm
from nat_plugin_evsys.policy.tool_forms.pythonic import PythonicForm
from nat_plugin_evsys.policy.tool_forms.qwen3_xml import Qwen3XmlForm

FORMS: tuple[type[ToolForm], ...] = (
    HarmonyForm,
    Qwen3XmlForm,
    HermesForm,
    MistralForm,
    DeepSeekForm,
    PythonicForm,
    Llama3JsonForm,
)
"""Of two that a template shows, the first counts."""


def form_of(template: str) -> ToolForm | None:
    """The form that a chat template shows its model; None if it is none of the known ones."""
    if "<function=" in template and "<parameter=" not in template:
        return None  # a form that has JSON within its tags
    return next((form(template) for form in FORMS if form.is_shown_by(template)), None)


def create_parser(
    form: ToolForm | None,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    reply_id: str = "",
    thinking: bool = False,
    split_thoughts: bool = False,
) -> ReplyParser:
    """A parser for one reply.

    Args:
        form: None looks for no calls.
        tools: the request's, in OpenAI form, for forms whose arguments have no types of their own; an empty list looks
            for no calls.
        reply_id: tool call ids are derived from it, so that parsing twice gives the same ids.
        thinking: the prompt ended inside a ``<think>`` block.
        split_thoughts: give thoughts out apart from the content (GPT-OSS's always are).
    """
    thoughts = Thoughts(thinking, split_thoughts)
    if form is None:
        return plain_parser(thoughts)
    if tools is not None and not tools:
        return form.plain_parser(thoughts)
    return form.parser([tool["function"] for tool in tools or ()], reply_id, thoughts)
