"""The prompt of a conversation that goes on: the ids that the policy read and sampled before, then the new text.

A reply that comes back in the history is not tokenised again, nor are its tool calls written again as the template
would write them: the policy reads what it wrote, and the two prompts share their ids. The template's text of the whole
conversation says what follows the reply. It must also show that the template leaves the earlier turns alone.
"""

from __future__ import annotations

import hashlib
import json
import threading
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nat_plugin_evsys.call_images import CallImage
from nat_plugin_evsys.calls import PromptHistory
from nat_plugin_evsys.policy.chat import ChatRenderer
from nat_plugin_evsys.policy.rendering.chat_template import opens_thinking
from nat_plugin_evsys.policy.rendering.images import ImageFile
from nat_plugin_evsys.policy.rendering.messages import arguments_value
from nat_plugin_evsys.policy.rendering.plain_text import unmarked

Message = dict[str, Any]

MAX_BYTES = 64 << 20
"""Of what is kept of earlier turns, all together; the oldest are forgotten first."""

_ENTRY_BYTES = 1 << 10


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a call reads.

    Attributes:
        ids: length P.
        text: the conversation as the template writes it. The ids may decode to another text: that of the policy.
        conversation: identifies messages and tools.
        history: how the earlier turns came to be in it.
        images: what placeholders among the ids stand for.
        scope: of the conversation; see ``History``.
    """

    ids: list[int]
    text: str
    conversation: bytes
    history: PromptHistory = PromptHistory.NEW
    images: Sequence[CallImage] = ()
    scope: str = ""


@dataclass(frozen=True, slots=True)
class Turn:
    """A prompt and the reply to it.

    Attributes:
        text: the prompt as the template writes it.
        ids: of the prompt and the reply; of the reply's only those whose whole text its client has seen.
        rest: the end of the reply's text where a stop string cuts a token in two.
        reply: the reply, in OpenAI form.
        images: of the prompt.
        scope: of the prompt.
    """

    text: str
    ids: array[int]
    rest: str
    reply: Message
    images: Sequence[CallImage] = ()
    scope: str = ""

    @property
    def size(self) -> int:
        """Bytes, roughly."""
        files = sum(len(image["data"]) for image in self.images)
        return self.ids.itemsize * len(self.ids) + 2 * len(self.text) + files + _ENTRY_BYTES


class History:
    """The turns of the conversations that may go on. Any thread may call any method.

    A turn is found by what the client has of it: the messages, the reply and the tools. Ids of tool calls and white
    space around a text do not matter, as clients change both. ``scope`` keeps rollouts apart, which may say the same in
    other tokens.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._turns: OrderedDict[bytes, Turn] = OrderedDict()  # by the conversation with its reply
        self._asked: OrderedDict[bytes, str] = OrderedDict()  # conversations that were sampled from, with their scopes
        self._bytes = 0

    def prompt(
        self,
        renderer: ChatRenderer,
        scope: str,
        messages: Sequence[Message],
        tools: Sequence[Message],
        *,
        enable_thinking: bool | None = None,
    ) -> Prompt:
        """The prompt of a conversation, which starts with the ids of its last known turn if it can.

        Raises:
            DataError: see ``ChatRenderer.render_shown`` and ``encode_shown``.
        """
        keys = _keys(scope, messages, tools)
        follows, turns = self._find(keys, messages)
        text, files = renderer.render_shown(_with_thoughts(messages, turns), tools, enable_thinking=enable_thinking)
        for end, turn in turns:
            continued = _continued(renderer, turn, text, files, tools)
            if continued is not None:
                how = PromptHistory.EXTENDED if end == follows else PromptHistory.CHANGED
                return Prompt(continued[0], text, keys[-1], how, continued[1], scope)
        if follows is None:
            history = PromptHistory.NEW
        else:
            known = bool(turns) and turns[0][0] == follows
            history = PromptHistory.REWRITTEN if known else PromptHistory.CHANGED
        ids, images = renderer.encode_shown(text, files)
        return Prompt(ids, text, keys[-1], history, images, scope)

    def add(self, prompt: Prompt, turn: Turn) -> None:
        """Remember a prompt and its reply."""
        key = _next_key(prompt.conversation, turn.reply)
        with self._lock:
            before = self._turns.pop(key, None)
            self._bytes += turn.size - (0 if before is None else before.size)
            self._turns[key] = turn
            if self._asked.pop(prompt.conversation, None) is None:
                self._bytes += _ENTRY_BYTES
            self._asked[prompt.conversation] = prompt.scope
            while self._bytes > self._max_bytes and self._turns:
                self._bytes -= self._turns.popitem(last=False)[1].size
                if len(self._asked) > len(self._turns):
                    self._asked.popitem(last=False)
                    self._bytes -= _ENTRY_BYTES

    def forget(self, scope: str) -> None:
        """Forget the turns of a scope, which nothing will follow."""
        with self._lock:
            for key in [key for key, turn in self._turns.items() if turn.scope == scope]:
                self._bytes -= self._turns.pop(key).size
            for conversation in [asked for asked, of in self._asked.items() if of == scope]:
                del self._asked[conversation]
                self._bytes -= _ENTRY_BYTES

    def _find(self, keys: Sequence[bytes], messages: Sequence[Message]) -> tuple[int | None, list[tuple[int, Turn]]]:
        """Where the newest reply to a known prompt ends, or None; the known turns with their ends, newest first."""
        replies = [end for end in range(len(messages) - 1, 0, -1) if messages[end - 1].get("role") == "assistant"]
        with self._lock:
            follows = next((end for end in replies if keys[end - 1] in self._asked), None)
            turns = [(end, self._turns[keys[end]]) for end in replies if keys[end] in self._turns]
            for end, _ in turns[:1]:
                self._turns.move_to_end(keys[end])
        return follows, turns


def turn_of(
    renderer: ChatRenderer, prompt: Prompt, output_ids: Sequence[int], with_text: int, seen: str, reply: Message
) -> Turn:
    """What is remembered of a reply.

    Args:
        output_ids: what was sampled, length T.
        with_text: how many of them have text; a last one that ended the reply has none.
        seen: the reply's text up to the stop string that ended it.
        reply: in OpenAI form.
    """
    kept = with_text
    while kept and not seen.startswith(renderer.decode(output_ids[:kept])):
        kept -= 1
    rest = seen[len(renderer.decode(output_ids[:kept])) :]
    if kept == with_text and list(output_ids[kept:]) == [renderer.end_of_turn]:
        kept += 1
    return Turn(prompt.text, array("i", [*prompt.ids, *output_ids[:kept]]), rest, reply, prompt.images, prompt.scope)


def _continued(
    renderer: ChatRenderer, turn: Turn, text: str, files: Sequence[ImageFile], tools: Sequence[Message]
) -> tuple[list[int], list[CallImage]] | None:
    """The ids and images of a turn and of what follows it in ``text``; None if the template has rewritten the turn.

    The ids are decoded and compared, so a tokenizer whose texts cannot be joined gives None too. ``files`` are the
    images of ``text``; the first of them are the turn's, as the turn was found by them.
    """
    end_of_turn = renderer.end_of_turn
    if end_of_turn is None or not text.startswith(turn.text):
        return None
    marker = renderer.decode([end_of_turn])
    end = text.find(marker, len(turn.text))
    if end < 0 or not _same_reply(renderer, text[len(turn.text) : end], turn, tools):
        return None
    closed = turn.ids[-1] == end_of_turn
    added = turn.rest + text[end + len(marker) if closed else end :]
    known = turn.ids.tolist()
    ids = renderer.encode(added)
    if renderer.decode(known + ids) != renderer.decode(known) + unmarked(added):
        return None
    new, images = renderer.encode_shown(added, files[len(turn.images) :], len(known))
    return known + new, [*turn.images, *images]


def _with_thoughts(messages: Sequence[Message], turns: Sequence[tuple[int, Turn]]) -> list[Message]:
    """The messages with the reasoning of known replies, which most clients do not send back; the template decides."""
    shown = list(messages)
    for end, turn in turns:
        thoughts = turn.reply.get("reasoning_content")
        if thoughts is not None and not shown[end - 1].get("reasoning_content"):
            shown[end - 1] = {**shown[end - 1], "reasoning_content": thoughts}
    return shown


def _same_reply(renderer: ChatRenderer, written: str, turn: Turn, tools: Sequence[Message]) -> bool:
    """Whether the template has written the reply, whatever the white space; not if it drops thoughts, for example."""
    reply, thinking = turn.reply, opens_thinking(turn.text)
    shown = tools if reply.get("tool_calls") else ()
    parsed = renderer.parse(unmarked(written), tools=shown, thinking=thinking).to_message()
    return _words(parsed) == _words(reply) and _calls(parsed) == _calls(reply)


def _words(message: Message) -> list[list[str]]:
    return [str(message.get(field) or "").split() for field in ("reasoning_content", "content")]


def _keys(scope: str, messages: Sequence[Message], tools: Sequence[Message]) -> list[bytes]:
    """Identifies the conversation up to each message; one more than there are messages."""
    keys = [_digest(b"", [scope, list(tools)])]
    for message in messages:
        keys.append(_next_key(keys[-1], message))
    return keys


def _next_key(conversation: bytes, message: Message) -> bytes:
    content = message.get("content") or ""
    if isinstance(content, list):  # whatever is no text and no image is refused when the messages are rendered
        content = "".join(_key_text(part) for part in content if isinstance(part, dict))
    return _digest(conversation, [message.get("role"), message.get("name"), str(content).strip(), _calls(message)])


def _key_text(part: dict[str, Any]) -> str:
    """A part's text; for an image the hash of its URL, which holds the file."""
    if part.get("type") != "image_url":
        return str(part.get("text"))
    return f"\0image {_digest(b'', part.get('image_url')).hex()}\0"


def _calls(message: Message) -> list[Any]:
    return [
        (function.get("name"), arguments_value(function.get("arguments")))
        for call in message.get("tool_calls") or []
        if isinstance(function := call.get("function"), dict)
    ]


def _digest(before: bytes, value: Any) -> bytes:
    data = json.dumps(value, sort_keys=True, default=str).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(data, digest_size=16, key=before).digest()
