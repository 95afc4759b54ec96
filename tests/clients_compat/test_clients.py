"""Clients as they come, each in its own environment, against the endpoint: chat, stream, tools, structured output.

What the policy says is scripted, so that every answer is known; constrained decoding has tests of its own.
``make test-clients`` runs all of them, CI the four most used; without ``CLIENTS`` none is run.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from client_environments import CLIENTS, MOST_USED, Client
from nat_process import ROOT

from nat_plugin_evsys.engine.model.loading import load_tokenizer
from nat_plugin_evsys.policy.chat import ChatRenderer
from nat_plugin_evsys.policy.endpoint import PolicyEndpoint, SamplingDefaults
from nat_plugin_evsys.policy.recorder import Recorder
from nat_plugin_evsys.testing import ScriptedSamplingClient

MODEL = "builtin/tiny"
HELLO, ANSWER, PERSON = "Hello there, friend.", "The sum is 5.", {"name": "Ada", "age": 36}
WANTED = os.environ.get("CLIENTS", "")
CHOSEN = {"most used": MOST_USED, "all": tuple(client.name for client in CLIENTS)}
NAMES = CHOSEN.get(WANTED, tuple(WANTED.split(",")))


def call(name: str, arguments: dict[str, Any]) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def reply_to(prompt: str) -> str:
    """What the policy says: by the question, the tools that it is shown, and whether one has answered."""
    tools = re.findall(r'"function": \{"name": "([\w-]+)"', prompt)
    if "sum of" in prompt:
        if "<tool_response>" not in prompt and "add" in tools:
            return call("add", {"a": 2, "b": 3})
        return call("final_answer", {"answer": ANSWER}) if "final_answer" in tools else ANSWER
    if "Ada" in prompt:
        made = [name for name in tools if name != "final_answer"]
        if made and "<tool_response>" not in prompt:
            return call(made[0], PERSON)
        return json.dumps({"person": PERSON} if "`person`" in prompt else PERSON)
    return HELLO


@pytest.fixture(scope="module")
def endpoint() -> Iterator[PolicyEndpoint]:
    tokenizer = load_tokenizer(MODEL)
    sampling = ScriptedSamplingClient(tokenizer, lambda ids: reply_to(tokenizer.decode(ids)))
    renderer = ChatRenderer(tokenizer)
    endpoint = PolicyEndpoint(
        renderer=lambda: renderer,
        sampling_client=lambda: sampling,
        recorder=Recorder(),
        defaults=lambda kind: SamplingDefaults(1.0, 1.0, 512),
        model_names=[MODEL],
        is_alias=lambda name: name in ("policy", "openai/policy"),
    )
    endpoint.start()
    yield endpoint
    endpoint.close()


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("client", [c for c in CLIENTS if c.name in NAMES], ids=lambda client: client.name)
def test_a_client_is_answered(client: Client, endpoint: PolicyEndpoint) -> None:
    program = ROOT / "interop" / "client_programs.py"
    python = client.python or sys.executable
    quiet = {"OPENAI_AGENTS_DISABLE_TRACING": "1", "CREWAI_DISABLE_TELEMETRY": "true", "OTEL_SDK_DISABLED": "true"}
    bare = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "OPENAI_API_KEY")}
    done = subprocess.run(
        [str(python), "-W", "ignore", str(program), client.name, endpoint.base_url, endpoint.api_key, "policy"],
        capture_output=True,
        text=True,
        timeout=600,
        env={**bare, **quiet, "PYTHONNOUSERSITE": "1"},
        stdin=subprocess.DEVNULL,
    )
    line = next((line for line in done.stdout.splitlines() if line.startswith("ANSWERS ")), None)
    assert line is not None, done.stderr[-3000:]
    answers = json.loads(line.removeprefix("ANSWERS "))
    expected = {"chat": HELLO, "stream": HELLO, "tool": ANSWER, "structured": PERSON}
    assert answers == {name: value for name, value in expected.items() if name not in client.lacks}
