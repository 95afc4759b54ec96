"""Messages to token ids and back, by the model's own chat template."""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from nat_plugin_evsys.call_images import CallImage
from nat_plugin_evsys.errors import DataError
from nat_plugin_evsys.policy.rendering.chat_template import NO_CONTEXT, PROBE, ChatTemplate
from nat_plugin_evsys.policy.rendering.images import ImageFile, placed
from nat_plugin_evsys.policy.rendering.messages import first_image, has_images, normalize_messages
from nat_plugin_evsys.policy.rendering.plain_text import MARK, PlainText
from nat_plugin_evsys.policy.rendering.token_bytes import TokenBytes
from nat_plugin_evsys.policy.reply_forms import ReplyForms
from nat_plugin_evsys.policy.tool_calls import AssistantReply, ReplyParser, ToolCallFormat, assemble
from nat_plugin_evsys.policy.tool_forms.families import create_parser

if TYPE_CHECKING:
    from nat_plugin_evsys.backends.base import ReadsImages
    from nat_plugin_evsys.config.policy import SpecialTokens

logger = logging.getLogger(__name__)

_QUICK_S = 5.0


class ChatRenderer:
    """Renders messages with a Hugging Face tokenizer's chat template and parses replies.

    Without ``split_thoughts``, ``<think>`` blocks stay in the content as they were sampled: templates that drop the
    reasoning of earlier turns (Qwen 3 and similar) do so themselves when the message comes back in the history. Tool
    calls inside a ``<think>`` block are ignored.

    A template that has no place for tools gets a prompt in Hermes' form in the system turn; see ``tool_prompt``.

    Args:
        chat_template: a Jinja template that replaces the tokenizer's own.
        enable_thinking: passed to the template when set.
        split_thoughts: parse ``<think>`` blocks into a message's ``reasoning_content``.
        special_tokens: what becomes of a special token's text within a message; see the policy's setting.
        images: reads the images of messages, or says why nothing does.

    Raises:
        ModelError: there is no chat template, or it could run forever.
        ConfigError: ``enable_thinking`` is set and the template does not use it.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        chat_template: str | None = None,
        enable_thinking: bool | None = None,
        split_thoughts: bool = False,
        special_tokens: SpecialTokens = "text",
        images: ReadsImages | str = "images go to evsys_policy and to `nat evsys serve`",
    ) -> None:
        # A copy and a lock: a fast tokenizer's call may change its padding state, which fails ("Already borrowed")
        # beside another thread's call.
        self.tokenizer = copy.deepcopy(tokenizer)
        self._lock = threading.Lock()
        self._template = ChatTemplate(self.tokenizer, chat_template, enable_thinking)
        self._enable_thinking = enable_thinking
        self._split_thoughts = split_thoughts
        self._special_tokens = special_tokens
        self._images = images

    # -- messages to ids --------------------------------------------------------------------------------------------

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        *,
        enable_thinking: bool | None = None,
    ) -> list[int]:
        """Token ids of the conversation, length P.

        Args:
            messages: in OpenAI form.
            tools: in OpenAI form; None or empty is no tools.
            add_generation_prompt: end with the opening of an assistant turn.
            enable_thinking: overrides the renderer's own.

        Raises:
            DataError: the template cannot render them; the message is the template's own.
        """
        return self.encode(self._render_text(messages, tools, add_generation_prompt, enable_thinking))

    def render_text(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        *,
        enable_thinking: bool | None = None,
    ) -> str:
        """The text that ``render`` encodes.

        Raises:
            DataError: see ``render``.
        """
        return self._render_text(messages, tools, add_generation_prompt, enable_thinking)

    def render_shown(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None = None,
        *,
        enable_thinking: bool | None = None,
    ) -> tuple[str, list[ImageFile]]:
        """The text of a conversation that opens an assistant turn, with one placeholder an image, and the images.

        Raises:
            DataError: see ``render``; there is an image and the policy reads none.
        """
        if not has_images(messages):
            return self._render_text(messages, tools, True, enable_thinking), []
        if isinstance(self._images, str):
            raise DataError(f"{first_image(messages)} is an image, and this policy reads text only: {self._images}")
        files: list[ImageFile] = []
        text = self._render_text(messages, tools, True, enable_thinking, files)
        return text.replace(*self._images.written(self.tokenizer)), files

    def encode_shown(self, text: str, files: Sequence[ImageFile], start: int = 0) -> tuple[list[int], list[CallImage]]:
        """The ids of such a text, with all placeholders of its images, and where these are.

        Args:
            start: how many ids of the prompt come before the text's.

        Raises:
            DataError: the text has another number of places than there are images, or an image cannot be read.
        """
        ids = self.encode(text)
        return placed(ids, files, self._images, start) if files and not isinstance(self._images, str) else (ids, [])

    def render_reply(
        self,
        message: dict[str, Any],
        messages: Sequence[dict[str, Any]] | None = None,
        tools: Sequence[dict[str, Any]] | None = None,
    ) -> list[int]:
        """Token ids of an assistant reply, including the end-of-turn token: what follows the generation prompt.

        Args:
            message: an assistant message in OpenAI form.
            messages: the conversation before it; templates may render a reply by what it follows.
            tools: the conversation's tools.

        Raises:
            DataError: it is not an assistant message, or the template does not render it after its generation prompt.
        """
        if message.get("role") != "assistant":
            raise DataError(f"a reply must have role `assistant`, not {message.get('role')!r}")
        context = list(messages) if messages else NO_CONTEXT
        prompt = self._render_text(context, tools, True, None)
        full = self._render_text([*context, message], tools, False, None)
        if not full.startswith(prompt):
            raise DataError(
                "the chat template does not render this reply directly after its generation prompt: the prompt ends "
                f"with {prompt[-60:]!r}, the conversation with the reply ends with {full[-60:]!r}; give a "
                "`chat_template` whose two forms agree"
            )
        end = self.end_of_turn
        if end is not None:
            marker = self.tokenizer.convert_ids_to_tokens(end)
            full = full[: max(full.rfind(marker) + len(marker), len(prompt))]
        prompt_ids, ids = self.encode(prompt), self.encode(full)
        reply = ids[len(prompt_ids) :] if ids[: len(prompt_ids)] == prompt_ids else self.encode(full[len(prompt) :])
        if end is None and self.tokenizer.eos_token_id is not None:
            reply.append(self.tokenizer.eos_token_id)
        return reply

    def _render_text(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None,
        add_generation_prompt: bool,
        enable_thinking: bool | None,
        images: list[ImageFile] | None = None,
    ) -> str:
        if tools and not self.supports_tools:
            raise DataError(
                "the model's chat template shows `tools` and asks for calls in a form that is not known; set a "
                "`chat_template` or send no tools"
            )
        if enable_thinking is None:
            enable_thinking = self._enable_thinking
        else:
            self._template.check_thinking(DataError)
        normal = normalize_messages(messages, images)

        def written(count: int) -> str:
            return self._template.write(
                *self._as_shown(normal[:count], tools or ()), add_generation_prompt, enable_thinking
            )

        started = time.monotonic()
        try:
            return written(len(normal))
        except DataError as error:
            if time.monotonic() - started > _QUICK_S:
                raise  # finding the message would take as long several times over
            raise DataError(f"`messages[{_offender(written, len(normal))}]`: {error}") from error

    def _as_shown(
        self, messages: list[dict[str, Any]], tools: Sequence[dict[str, Any]]
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        shown, tools = self._template.prepared(messages, tools)
        if self._special_tokens == "text":
            shown, tools = self._plain_text.marked(shown), self._plain_text.marked(tools)
        return shown, tools

    def encode(self, text: str) -> list[int]:
        """The token ids of rendered text."""
        with self._lock:
            if self._special_tokens == "text" and MARK in text:
                return self._plain_text.encode(text)
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    # -- ids to messages --------------------------------------------------------------------------------------------

    def parse(
        self,
        reply: str | Sequence[int],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        reply_id: str = "",
        thinking: bool | None = None,
    ) -> AssistantReply:
        """The assistant message in a reply's text or sampled ids (with or without the end-of-turn token).

        Args:
            tools: the request's, in OpenAI form; without any no calls are looked for. None looks for calls of any tool.
            reply_id: tool call ids are derived from it.
            thinking: see ``create_parser``.
        """
        text = reply if isinstance(reply, str) else self.decode(self.without_stop(reply))
        parser = self.create_parser(tools=tools, reply_id=reply_id, thinking=thinking)
        return assemble(parser.feed(text) + parser.finish())

    def create_parser(
        self, *, tools: Sequence[dict[str, Any]] | None = None, reply_id: str = "", thinking: bool | None = None
    ) -> ReplyParser:
        """A parser that reads a reply's text piece by piece; see ``parse``.

        Args:
            thinking: whether the prompt ends inside a ``<think>`` block; None: if the template opens one.
        """
        return create_parser(
            self._template.tool_form,
            tools=tools,
            reply_id=reply_id,
            thinking=self._template.prompt_opens_thinking if thinking is None else thinking,
            split_thoughts=self._split_thoughts and self._template.thinks,
        )

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, control tokens included."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def without_stop(self, ids: Sequence[int]) -> list[int]:
        """The ids without the control token that ended the sequence.

        That may be any special token, not only the template's: models end a text with one of several.
        """
        return list(ids[:-1]) if ids and self.may_end(ids[-1]) else list(ids)

    def may_end(self, token_id: int) -> bool:
        """Whether a token may have ended a sequence."""
        return token_id in self._special_ids or token_id in self.stop_token_ids

    def is_control(self, token_id: int) -> bool:
        """Whether the tokenizer keeps a token apart from text, such as ``<|im_end|>`` or ``<tool_call>``."""
        return token_id in self._control_ids

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes that a token stands for; a token may be only part of a character."""
        return self._token_bytes.of(token_id)

    @cached_property
    def reply_forms(self) -> ReplyForms:
        """The forms that a reply can be held to."""
        return ReplyForms(
            self._template.tool_form,
            lambda text: token_id if (token_id := self._vocabulary.get(text)) in self._control_ids else None,
            thinks="<think>" in self._template.source,
        )

    # -- what the template says of itself ---------------------------------------------------------------------------

    @cached_property
    def stop_token_ids(self) -> list[int]:
        """Ids that end an assistant turn: the tokenizer's EOS and what the template writes after a reply."""
        ids = {self.tokenizer.eos_token_id, self.end_of_turn}
        form = self._template.tool_form
        ids |= {self._vocabulary.get(token) for token in (() if form is None else form.ends)}
        return sorted(token_id for token_id in ids if token_id is not None)

    @property
    def tool_format(self) -> ToolCallFormat | None:
        """How the model writes tool calls; None if the form is unknown."""
        form = self._template.tool_form
        return None if form is None else form.name

    @property
    def hidden_ids(self) -> frozenset[int]:
        """Special tokens, which a text without them does not show."""
        return self._special_ids

    @property
    def writes_special_tokens(self) -> bool:
        """Whether every reply is written with special tokens, which its parser reads."""
        form = self._template.tool_form
        return form is not None and form.is_marked

    @property
    def supports_tools(self) -> bool:
        """Whether tools can be shown to the model, and its calls be parsed."""
        return self.tool_format is not None

    @cached_property
    def end_of_turn(self) -> int | None:
        """The control token that the template writes after an assistant's content."""
        text = self._template.write([*NO_CONTEXT, {"role": "assistant", "content": "x" + PROBE}], None, False, None)
        tail = self.encode(text.rpartition("x" + PROBE)[2].lstrip())
        return tail[0] if tail and tail[0] in self._control_ids else None

    @cached_property
    def _vocabulary(self) -> dict[str, int]:
        vocabulary: dict[str, int] = self.tokenizer.get_vocab()
        return vocabulary

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        added = self.tokenizer.added_tokens_decoder.items()
        return frozenset([*self.tokenizer.all_special_ids, *(token_id for token_id, token in added if token.special)])

    @cached_property
    def _control_ids(self) -> frozenset[int]:
        return frozenset([*self.tokenizer.added_tokens_decoder, *self.tokenizer.all_special_ids])

    @cached_property
    def _token_bytes(self) -> TokenBytes:
        return TokenBytes(self.tokenizer, self._control_ids, self.decode)

    @cached_property
    def _plain_text(self) -> PlainText:
        return PlainText(self.tokenizer, {text: id for text, id in self._vocabulary.items() if id in self._special_ids})


def _offender(written: Callable[[int], str], count: int) -> int:
    """Index of the message with which rendering fails; longer conversations fail as well."""
    low, high = 1, count
    while low < high:
        middle = (low + high) // 2
        try:
            written(middle)
        except DataError:
            high = middle
        else:
            low = middle + 1
    return low - 1
