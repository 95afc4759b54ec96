"""What is added to NAT's error about an unknown ``_type``."""

from __future__ import annotations

import logging

import pytest
from nat.data_models.config import Config
from nat.utils.exception_handlers.schemas import schema_exception_handler
from pydantic import ValidationError

import nat_plugin_evsys.register  # noqa: F401 - the types, and the suggestions
from nat_plugin_evsys.config.suggestions import closest


@pytest.mark.parametrize(
    ("asked", "suggested"),
    [("evsys_exact_mach", "evsys_exact_match"), ("exact_match", "evsys_exact_match"), ("my_own_judge", None)],
)
def test_the_most_similar_name(asked: str, suggested: str | None) -> None:
    assert closest(asked, ["evsys_exact_match", "evsys_function_call", "ragas"]) == suggested


@pytest.mark.parametrize(
    ("config", "suggestion"),
    [
        ({"eval": {"evaluators": {"right": {"_type": "evsys_exact_mach"}}}}, "evsys_exact_match"),
        ({"trainers": {"trainer": {"_type": "evsys_trainr"}}}, "evsys_trainer"),
    ],
)
def test_nats_own_record_gets_the_line(
    caplog: pytest.LogCaptureFixture, config: dict[str, object], suggestion: str
) -> None:
    validate = schema_exception_handler(Config.model_validate)
    with caplog.at_level(logging.ERROR), pytest.raises((ValidationError, ValueError)):
        validate(config)
    assert caplog.text.count(f"Did you mean `_type: {suggestion}`?") == 1
