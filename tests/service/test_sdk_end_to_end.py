"""The official SDK, unmodified, against a server in another process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openai
import pytest
from sdk_report import sdk_report
from serve_process import ServerProcess


@pytest.fixture(scope="module")
def report(open_server: ServerProcess, served_model: Path) -> dict[str, Any]:
    """What ``sdk_script.py`` printed."""
    return sdk_report(open_server.url, served_model, timeout=180)


def test_every_call_of_the_sdk_does_what_it_says(report: dict[str, Any]) -> None:
    assert report["problems"] == []
    assert report["skipped"] == []
    assert report["facts"]["closed"]


def test_the_openai_client_chats_with_the_base_model_and_a_checkpoint(
    report: dict[str, Any], open_server: ServerProcess, served_model: Path
) -> None:
    client = openai.OpenAI(base_url=f"{open_server.url}/v1", api_key="tml-local", max_retries=0)
    ask: dict[str, Any] = {
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 8,
        "temperature": 0.0,
        "logprobs": True,
        "extra_body": {"return_token_ids": True},
    }
    path = report["facts"]["sampler_path"]
    replies = {}
    for name in (str(served_model), path, report["facts"]["model_id"]):
        reply = client.chat.completions.create(model=name, **ask)
        ids = reply.choices[0].model_extra["token_ids"]
        assert len(ids) == len(reply.choices[0].logprobs.content) == reply.usage.completion_tokens
        replies[name] = ids
    assert replies[path] == replies[report["facts"]["model_id"]]
    assert replies[path] != replies[str(served_model)]
    assert path in [model.id for model in client.models.list()]


def test_tinkers_own_place_streams_the_same_tokens(report: dict[str, Any], open_server: ServerProcess) -> None:
    path = report["facts"]["sampler_path"]
    ask: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, "temperature": 0.0}
    plain = openai.OpenAI(base_url=f"{open_server.url}/v1", api_key="tml-local", max_retries=0)
    tinkers = openai.OpenAI(base_url=f"{open_server.url}/oai/api/v1", api_key="tml-local", max_retries=0)
    whole = plain.chat.completions.create(model=path, **ask).choices[0].message.content
    pieces = [
        chunk.choices[0].delta.content for chunk in tinkers.chat.completions.create(model=path, stream=True, **ask)
    ]
    assert "".join(piece or "" for piece in pieces) == whole
