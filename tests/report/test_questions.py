"""What a dataset row asks, for the titles of the report."""

from __future__ import annotations

from typing import Any

import pytest

from nat_plugin_evsys.report.questions import question_text


@pytest.mark.parametrize(
    ("question", "text"),
    [
        ('{"question": "What is the area?", "functions": [{"name": "area"}]}', "What is the area?"),
        (' {"note": "a longer text than the query", "query": "Which team?"}', "Which team?"),
        ({"input": "Which team?"}, "Which team?"),
        ({"question": "", "ticket": "My wifi is broken.", "caller": "Ann"}, "My wifi is broken."),
        ({"board": ["x", "o"], "turn": 3}, None),
        ("My wifi is broken.", None),
        ("{wifi} is broken", None),
        ('["a", "b"]', None),
        (None, None),
        (3, None),
    ],
)
def test_the_text_of_a_row_that_is_an_object(question: Any, text: str | None) -> None:
    assert question_text(question) == text
