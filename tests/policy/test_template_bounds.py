"""A chat template that runs for ever, writes without end or computes a power does not take its server with it."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from nat_plugin_evsys.errors import DataError, ModelError
from nat_plugin_evsys.policy.chat import ChatRenderer
from nat_plugin_evsys.policy.rendering import template_bounds
from nat_plugin_evsys.policy.rendering.template_bounds import refuse_powers

MESSAGES = [{"role": "user", "content": "hi"}]
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
LIST = "{% set r = range(99999) | list %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    "template", [LOOP, "{% set r = range(99999) | list %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}"]
)
def test_a_template_that_does_not_end_is_stopped(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    monkeypatch.setattr(template_bounds, "RENDER_SECONDS", 0.5)
    renderer = ChatRenderer(tokenizer, chat_template=template)
    started = time.monotonic()
    with pytest.raises(DataError, match=r"cannot render these messages: it took longer than 0\.5 s"):
        renderer.render(MESSAGES)
    assert time.monotonic() - started < 20
    deadline = time.monotonic() + 20
    while any(thread.name.startswith("evsys-template") for thread in threading.enumerate()):
        assert time.monotonic() < deadline, "it still runs"
        time.sleep(0.05)


def test_a_template_that_writes_without_end_is_refused(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_bounds, "MAX_CHARACTERS", 100_000)
    renderer = ChatRenderer(tokenizer, chat_template="{% for a in range(99999) %}text{% endfor %}")
    with pytest.raises(DataError, match="it writes 399996 characters; at most 100000 are taken"):
        renderer.render(MESSAGES)


def test_a_template_that_calls_itself_is_refused(tokenizer: Any) -> None:
    template = "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}"
    with pytest.raises(DataError, match="cannot render"):
        ChatRenderer(tokenizer, chat_template=template).render(MESSAGES)


@pytest.mark.parametrize("template", ["{{ 10**10**10 }}", "{% set x = messages|length ** 99 %}", "{{ (3) ** 4 }}"])
def test_a_template_that_computes_a_power_is_refused_unread(tokenizer: Any, template: str) -> None:
    with pytest.raises(ModelError, match="computes a power"):
        ChatRenderer(tokenizer, chat_template=template)


def test_stars_that_are_no_power_are_taken(tokenizer: Any) -> None:
    for source in ("**bold** {{ '**' }}", "{{ dict(**x) }}{{ f(a, **b) }}", "{# 2 ** 3 #}{{ 2 * 3 }}"):
        refuse_powers(source)
    refuse_powers(tokenizer.get_chat_template(None, None))


def test_what_a_template_raises_is_said(tokenizer: Any) -> None:
    renderer = ChatRenderer(tokenizer, chat_template="{{ raise_exception('no system messages') }}")
    with pytest.raises(DataError, match="no system messages"):
        renderer.render(MESSAGES)
