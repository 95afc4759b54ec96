"""Chat templates come with models that others made: what one may take of time and write is bounded.

The sandbox that transformers renders them in keeps a template from reading or changing anything; it does not keep
nested loops from running for hours.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Callable

from nat_plugin_evsys.errors import DataError, ModelError, RenderingStopped

RENDER_SECONDS = 20.0
"""For one conversation."""

MAX_CHARACTERS = 16 << 20
"""Of one conversation as text."""

_ASK_AGAIN_S = 0.2
_BEFORE_A_VALUE = {"(", ",", "[", "{", "{{", "{%", "{%-", "{{-", "="}


def refuse_powers(source: str) -> None:
    """A power is computed when the template is compiled, in one step that nothing can stop.

    Raises:
        ModelError: the template has ``**`` between two values, which no template of a chat needs.
    """
    from jinja2 import Environment, TemplateError

    lexer = Environment()  # noqa: S701 - nothing is rendered, and a chat's text is for a model, not a browser
    try:
        tokens = [(kind, value) for _, kind, value in lexer.lex(source) if kind not in ("whitespace", "data")]
    except TemplateError as error:
        raise ModelError(f"the chat template is not a Jinja template: {error}") from error
    for (_, before), (kind, value) in itertools.pairwise(tokens):
        if kind == "operator" and value == "**" and before not in _BEFORE_A_VALUE:
            raise ModelError("the chat template computes a power (`**`), which may take forever; set a `chat_template`")


def render_bounded(render: Callable[[], str]) -> str:
    """What ``render`` returns.

    Raises:
        DataError: it takes longer than ``RENDER_SECONDS``, and has been stopped, or is longer than ``MAX_CHARACTERS``.
    """
    rendering = _Rendering(render)
    text = rendering.result(RENDER_SECONDS)
    if len(text) > MAX_CHARACTERS:
        raise DataError(f"it writes {len(text)} characters; at most {MAX_CHARACTERS} are taken")
    return text


class _Rendering:
    """One call, in a thread of its own: an exception that comes too late for the call then hits nothing else."""

    def __init__(self, render: Callable[[], str]) -> None:
        self._render = render
        self._text: str | None = None
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="evsys-template", daemon=True)

    def result(self, seconds: float) -> str:
        self._thread.start()
        self._thread.join(seconds)
        if self._thread.is_alive():
            threading.Thread(target=self._stop, name="evsys-template-stop", daemon=True).start()
            raise DataError(f"it took longer than {seconds:g} s")
        if self._error is not None:
            raise self._error
        assert self._text is not None
        return self._text

    def _run(self) -> None:
        try:
            self._text = self._render()
        except RenderingStopped:
            pass
        except Exception as error:  # noqa: BLE001 - raised again for the caller
            self._error = error

    def _stop(self) -> None:
        while self._thread.is_alive():
            ident = ctypes.c_ulong(self._thread.ident or 0)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(RenderingStopped))
            self._thread.join(_ASK_AGAIN_S)
