"""A reply's text while its tokens arrive: UTF-8 safe, cut at stop strings, split into content and tool calls."""

from __future__ import annotations

from collections.abc import Sequence

from nat_plugin_evsys.calls import StopReason
from nat_plugin_evsys.policy.chat import ChatRenderer
from nat_plugin_evsys.policy.tool_calls import Piece, ReplyParser, held_back

_REPLACEMENT = "\ufffd"
_CHARACTER = 4
"""The longest character in UTF-8, in bytes. A token with text has one at least."""


class TokenDecoder:
    """Decodes token ids one after the other; characters that are not complete yet are held back.

    A few short decodes per token: only the ids since the last complete character, after the ids just before them
    (a token's text may depend on its neighbour). Broken characters may go on for long; of those only the last ids are
    looked at, as the last character lies in them.
    """

    def __init__(self, renderer: ChatRenderer) -> None:
        self._renderer = renderer
        self._window: list[int] = []
        self._known = 0  # ids of the window whose text has been given out

    def feed(self, ids: Sequence[int]) -> str:
        """The text that has become certain."""
        return "".join(self._feed_one(token_id) for token_id in ids)

    def finish(self) -> str:
        """The text of what is held back, with replacement characters for broken ones."""
        text = self._renderer.decode(self._window)[len(self._known_text()) :]
        self._window, self._known = [], 0
        return text

    def _feed_one(self, token_id: int) -> str:
        self._window.append(token_id)
        if len(self._window) - self._known > _CHARACTER:
            end = self._renderer.decode(self._window[-_CHARACTER:])
            if not end or end.endswith(_REPLACEMENT):
                return ""
        known = self._known_text()
        text = self._renderer.decode(self._window)
        if len(text) <= len(known) or text.endswith(_REPLACEMENT):
            return ""
        self._window, self._known = self._window[self._known :], len(self._window) - self._known
        return text[len(known) :]

    def _known_text(self) -> str:
        return self._renderer.decode(self._window[: self._known]) if self._known else ""


class StopStrings:
    """Passes text on up to the first stop string, or with ``keep`` up to its end."""

    def __init__(self, stops: Sequence[str], *, keep: bool = False) -> None:
        self._stops = list(stops)
        self._keep = keep
        self._text = ""
        self._stopped = False

    def feed(self, text: str) -> str:
        """The text that is certain to come before any stop string."""
        if self._stopped or not self._stops:
            return "" if self._stopped else text
        self._text += text
        found = [(at, len(stop)) for stop in self._stops if (at := self._text.find(stop)) >= 0]
        if found:
            self._stopped = True
            at, length = min(found)
            text, self._text = self._text[: at + length if self._keep else at], ""
            return text
        keep = held_back(self._text, self._stops)
        text, self._text = self._text[: len(self._text) - keep], self._text[len(self._text) - keep :]
        return text

    def finish(self) -> str:
        """The text that was held back and turned out not to begin a stop string."""
        text, self._text = self._text, ""
        return text


def cut_at_stop(text: str, stops: Sequence[str], *, keep: bool = False) -> str:
    """A whole reply's text up to the first stop string, or with ``keep`` up to its end."""
    cutter = StopStrings(stops, keep=keep)
    return cutter.feed(text) + cutter.finish()


class ReplyText:
    """One reply's way from text to pieces; plain and streamed replies both go through it.

    Args:
        keep_stop: the stop string that ends the reply is part of its text.
    """

    def __init__(self, parser: ReplyParser, *, stops: Sequence[str], keep_stop: bool = False) -> None:
        self._stops = StopStrings(stops, keep=keep_stop)
        self._parser = parser

    @property
    def malformed(self) -> int:
        """What looked like a tool call and was none, so far."""
        return self._parser.malformed

    def feed(self, text: str) -> list[Piece]:
        """The pieces that have become certain."""
        return self._parser.feed(self._stops.feed(text))

    def finish(self) -> list[Piece]:
        """The pieces that are left."""
        return self._parser.feed(self._stops.finish()) + self._parser.finish()


class StreamedReply:
    """One streamed reply: token ids in, pieces out.

    A control token is held back until it is clear whether it ended the reply: then it has no text.

    Args:
        text: takes the reply's text.
        forced_ids: the reply's beginning, which is in the prompt and not among its ids.
        hidden: ids without text.
    """

    def __init__(
        self,
        renderer: ChatRenderer,
        text: ReplyText,
        forced_ids: Sequence[int] = (),
        hidden: frozenset[int] = frozenset(),
    ) -> None:
        self._renderer = renderer
        self._hidden = hidden
        self._forced_ids = list(forced_ids)
        self._decoder = TokenDecoder(renderer)
        self._text = text
        self._decoded = 0
        self.ids: list[int] = []
        self.calls = 0  # tool calls given out so far

    def feed(self, ids: Sequence[int]) -> list[Piece]:
        """The pieces that have become certain."""
        self.ids.extend(ids)
        return self._text.feed(self._decode(self._renderer.without_stop(self.ids[self._decoded :])))

    def finish(self, text_ids: Sequence[int]) -> list[Piece]:
        """The pieces that are left; ``text_ids`` are all ids of the reply's text (see ``text_ids``)."""
        text = self._decode(text_ids[self._decoded :]) + self._decoder.finish()
        return self._text.feed(text) + self._text.finish()

    def _decode(self, ids: Sequence[int]) -> str:
        self._decoded += len(ids)
        forced, self._forced_ids = self._forced_ids, []
        return self._decoder.feed([token_id for token_id in [*forced, *ids] if token_id not in self._hidden])


def text_ids(renderer: ChatRenderer, ids: Sequence[int], stop_reason: StopReason, stops: Sequence[str]) -> list[int]:
    """The output ids that have text: all but the control token that ended the sequence.

    A token that a stop string names is left in: the stop string cuts the text there.
    """
    if stop_reason != "stop" or any(renderer.decode(ids[-1:]) in stop for stop in stops):
        return list(ids)
    return renderer.without_stop(ids)
