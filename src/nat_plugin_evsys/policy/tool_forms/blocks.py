"""Replies whose tool calls stand in blocks between markers, beside text and thoughts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from nat_plugin_evsys.policy.tool_calls import SPACE, Function, Piece, Thought, ToolCall, held_back, tool_call_id
from nat_plugin_evsys.policy.tool_forms.functions import ends_in_string
from nat_plugin_evsys.policy.tool_forms.stepping import SteppingParser

Block = tuple[list[Function], int]
"""The calls of a block and its length, from behind its opening marker to behind its closing one."""

MORE: Literal["more"] = "more"
"""More text is needed to tell."""


class BlockReader(Protocol):
    """How a family writes its blocks. ``opens`` are the markers that open one."""

    opens: Sequence[str]

    def read(self, opening: str, text: str, final: bool) -> Block | Literal["more"] | None:
        """The block that ``text`` begins with, behind its opening marker; None if it is none.

        Args:
            final: the reply ends with ``text``, so ``MORE`` is no answer.
        """
        ...


def closed_block(
    text: str, close: str, functions_of: Callable[[str], list[Function] | None], final: bool
) -> Block | Literal["more"] | None:
    """See ``BlockReader.read``: a block of JSON that ``close`` ends, which may be missing at the end of the reply.

    Args:
        functions_of: the calls that the text between the markers consists of, if it does.
    """
    end = text.find(close)
    while end >= 0:
        functions = functions_of(text[:end])
        if functions:
            return functions, end + len(close)
        if not ends_in_string(text[:end]):
            return None
        end = text.find(close, end + 1)  # this one belongs to an argument
    if not final:
        return MORE
    functions = functions_of(text)
    return (functions, len(text)) if functions else None


@dataclass(frozen=True, slots=True)
class Thoughts:
    """How thoughts are read.

    Attributes:
        opened: the prompt ended within a ``<think>`` block.
        split: thoughts become ``Thought`` pieces without their tags; otherwise they stay in the content as written.
    """

    opened: bool = False
    split: bool = False


class BlockParser(SteppingParser):
    """Finds blocks of calls outside ``<think>`` blocks.

    A block that is no call stays in the content as it was written. One line end before a block belongs to it (the
    templates write it there), and so does the white space between blocks and after the last one.
    """

    _THINK, _END_THINK = "<think>", "</think>"

    def __init__(
        self,
        form: BlockReader | None,
        thoughts: Thoughts,
        *,
        reply_id: str = "",
        call_id: Callable[[str, int], str] = tool_call_id,
    ) -> None:
        super().__init__()
        self._form = form
        self._thoughts = thoughts
        self._opens = () if form is None else tuple(form.opens)
        self._reply_id, self._call_id = reply_id, call_id
        self._state: Literal["content", "think", "call"] = "think" if thoughts.opened else "content"
        self._opening = ""
        self._space = ""  # white space that a tool call may follow
        self._calls = 0
        self._content_since_call = False
        self._thought = ""  # white space at the end of the thoughts so far
        self._thinking_began = False
        self._after_thoughts = False

    def finish(self) -> list[Piece]:
        """What is left at the end of the reply."""
        pieces = self._advance("", final=True)
        self._emit(self._text, pieces)
        self._text = ""
        if self._space and (self._content_since_call or not self._calls):
            pieces.append(self._space)
        return pieces

    def _step(self, pieces: list[Piece], final: bool) -> bool:
        """Decide on one more marker; False when more text is needed."""
        if self._state == "call":
            return self._step_call(pieces, final)
        markers = [self._END_THINK] if self._state == "think" else [*self._opens, self._THINK]
        found = [(at, marker) for marker in markers if (at := self._text.find(marker)) >= 0]
        if not found:
            keep = 0 if final else held_back(self._text, markers)
            self._emit(self._text[: len(self._text) - keep], pieces)
            self._text = self._text[len(self._text) - keep :]
            return False
        at, marker = min(found)
        self._emit(self._text[:at], pieces)
        self._text = self._text[at + len(marker) :]
        if marker in self._opens:
            self._state, self._opening = "call", marker
            return True
        if self._thoughts.split:
            self._after_thoughts = marker == self._END_THINK
            if self._after_thoughts:
                self._thought = "\n"  # between these thoughts and any later ones
            elif not self._content_since_call:
                self._space = ""
        else:
            self._emit(marker, pieces)
        self._state = "think" if marker == self._THINK else "content"
        return True

    def _step_call(self, pieces: list[Piece], final: bool) -> bool:
        assert self._form is not None
        block = self._form.read(self._opening, self._text, final)
        if block == MORE:
            return False
        self._state = "content"
        if block is None:  # the marker becomes text, and what follows it is read again
            self.malformed += 1
            self._emit(self._opening, pieces)
            return True
        functions, length = block
        self._text = self._text[length:]
        if self._content_since_call and (space := self._space.removesuffix("\n")):
            pieces.append(space)
        self._space, self._content_since_call = "", False
        for function in functions:
            pieces.append(ToolCall(self._call_id(self._reply_id, self._calls), *function))
            self._calls += 1
        return True

    def _emit(self, text: str, pieces: list[Piece]) -> None:
        if self._thoughts.split and self._state == "think":
            self._emit_thought(text, pieces)
            return
        if self._thoughts.split and self._after_thoughts:  # the space that sets the answer off from the thoughts
            text = text.lstrip(SPACE)
            self._after_thoughts = not text
        text = self._space + text
        body = text.rstrip(SPACE)
        self._space = text[len(body) :]
        if body:
            pieces.append(body)
            self._content_since_call = True

    def _emit_thought(self, text: str, pieces: list[Piece]) -> None:
        text = self._thought + text if self._thinking_began else text.lstrip(SPACE)
        body = text.rstrip(SPACE)
        self._thought = text[len(body) :]
        if body:
            self._thinking_began = True
            pieces.append(Thought(body))
