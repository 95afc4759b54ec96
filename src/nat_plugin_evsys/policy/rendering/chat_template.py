"""A model's chat template: what it writes, and what it says of itself."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from nat_plugin_evsys.errors import ConfigError, DataError, ModelError
from nat_plugin_evsys.policy.rendering.template_bounds import refuse_powers, render_bounded
from nat_plugin_evsys.policy.rendering.tool_prompt import without_tools
from nat_plugin_evsys.policy.tool_forms.families import form_of
from nat_plugin_evsys.policy.tool_forms.form import ToolForm
from nat_plugin_evsys.policy.tool_forms.hermes import HermesForm

logger = logging.getLogger(__name__)

PROBE = "probe"
PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": PROBE,
        "description": PROBE,
        "parameters": {"type": "object", "properties": {"text": {"type": "string"}}},
    },
}
NO_CONTEXT = [{"role": "user", "content": PROBE}]
_TOO_MUCH = (RecursionError, MemoryError, OverflowError)

Message = dict[str, Any]


def opens_thinking(prompt: str) -> bool:
    """Whether a prompt that opens an assistant turn ends inside a ``<think>`` block."""
    return prompt.rstrip().endswith("<think>")


class ChatTemplate:
    """The template of a Hugging Face tokenizer, or another one on it.

    Args:
        chat_template: a Jinja template that replaces the tokenizer's own.
        enable_thinking: passed to the template when set.

    Raises:
        ModelError: there is no chat template, or it could run forever.
        ConfigError: ``enable_thinking`` is set and the template does not use it.
    """

    def __init__(self, tokenizer: Any, chat_template: str | None, enable_thinking: bool | None) -> None:
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._enable_thinking = enable_thinking
        self._said_prompted = False
        try:
            self.source: str = tokenizer.get_chat_template(chat_template, None)
            self._tools_source: str = tokenizer.get_chat_template(chat_template, [PROBE_TOOL])
        except ValueError as error:
            raise ModelError(
                f"the tokenizer of {tokenizer.name_or_path!r} has no chat template; set `chat_template` to a Jinja file"
            ) from error
        refuse_powers(self.source)
        refuse_powers(self._tools_source)
        if enable_thinking is not None:
            self.check_thinking(ConfigError)

    def write(
        self,
        messages: list[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None,
        add_generation_prompt: bool,
        enable_thinking: bool | None,
    ) -> str:
        """The text of messages and tools, as ``prepared`` gives them.

        Raises:
            DataError: the template cannot render them; the message is the template's own.
        """
        from jinja2 import TemplateError

        extra = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        try:
            return render_bounded(
                lambda: self._tokenizer.apply_chat_template(
                    messages,
                    tools=list(tools) if tools else None,
                    chat_template=self._chat_template,
                    add_generation_prompt=add_generation_prompt,
                    tokenize=False,
                    **extra,
                )
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, *_TOO_MUCH) as error:
            raise DataError(f"the model's chat template cannot render these messages: {error}") from error

    def prepared(self, messages: Sequence[Message], tools: Sequence[Message]) -> tuple[list[Message], list[Message]]:
        """Normalized messages and tools as this template takes them.

        Raises:
            DataError: the template does not read the reasoning of a message.
        """
        shown = self._with_thoughts(messages)
        return (shown, list(tools)) if self.shows_tools else (self._prompted(shown, list(tools)), [])

    def _with_thoughts(self, messages: Sequence[Message]) -> list[Message]:
        """Reasoning where the template looks for it: in a field of the message, or in the content."""
        if "reasoning_content" in self.source:
            return list(messages)
        shown = []
        for message in messages:
            thoughts = message.get("reasoning_content")
            if thoughts is not None:
                message = {key: value for key, value in message.items() if key != "reasoning_content"}
                if ".thinking" in self.source:
                    message["thinking"] = thoughts
                elif self.thinks:
                    message["content"] = f"<think>\n{thoughts}\n</think>\n\n{message['content']}"
                else:
                    raise DataError("`reasoning_content` is not read by the model's chat template")
            shown.append(message)
        return shown

    def _prompted(self, messages: list[Message], tools: list[Message]) -> list[Message]:
        if tools and not self._said_prompted:
            self._said_prompted = True
            logger.warning("the chat template has no place for tools: the system turn shows them in Hermes' form")
        return without_tools(messages, tools, has_system=self._takes_system)

    @cached_property
    def tool_form(self) -> ToolForm | None:
        """How the model writes tool calls, read from the template; None if the form is unknown."""
        return form_of(self._tools_source) if self.shows_tools else HermesForm()

    @cached_property
    def thinks(self) -> bool:
        """Whether the template knows ``<think>`` blocks."""
        return "</think>" in self.source or self.prompt_opens_thinking

    @cached_property
    def shows_tools(self) -> bool:
        """Whether it has a place for tools; without, they are shown in a prompt."""
        with_tool, without = (self.write(NO_CONTEXT, tools, True, None) for tools in ([PROBE_TOOL], None))
        return with_tool != without

    @cached_property
    def _takes_system(self) -> bool:
        system = [{"role": "system", "content": PROBE + PROBE}, *NO_CONTEXT]
        try:
            return PROBE + PROBE in self.write(system, None, True, None)
        except DataError:
            return False

    @cached_property
    def prompt_opens_thinking(self) -> bool:
        """Whether the generation prompt ends inside a ``<think>`` block."""
        return opens_thinking(self.write(NO_CONTEXT, None, True, self._enable_thinking))

    def check_thinking(self, error: type[ConfigError] | type[DataError]) -> None:
        """Raises ``error`` if the template does not use ``enable_thinking``."""
        if "enable_thinking" not in self.source:
            raise error("`enable_thinking` is set, but the model's chat template does not use it; remove it")
