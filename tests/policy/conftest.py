"""A real endpoint in front of scripted or really sampled replies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import openai
import pytest

from nat_plugin_evsys.engine.model.loading import load_tokenizer
from nat_plugin_evsys.policy.chat import ChatRenderer
from nat_plugin_evsys.policy.endpoint import PolicyEndpoint, SamplingDefaults
from nat_plugin_evsys.policy.recorder import Recorder
from nat_plugin_evsys.testing import ScriptedSamplingClient

MODEL = "builtin/tiny"


@pytest.fixture
def add_tool() -> dict[str, Any]:
    """A tool in OpenAI form."""
    return {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add two numbers.",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "number"}, "b": {"type": "number"}},
                "required": ["a", "b"],
            },
        },
    }


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """The builtin model's tokenizer."""
    return load_tokenizer(MODEL)


@pytest.fixture(scope="session")
def renderer(tokenizer: Any) -> ChatRenderer:
    """The builtin model's chat renderer."""
    return ChatRenderer(tokenizer)


@dataclass
class Served:
    """A running endpoint and what stands behind it."""

    endpoint: PolicyEndpoint
    recorder: Recorder
    sampling: Any

    def client(self, **options: Any) -> openai.AsyncOpenAI:
        """The OpenAI SDK's client, with no retries unless told otherwise."""
        settings = {"api_key": self.endpoint.api_key, "base_url": self.endpoint.base_url, "max_retries": 0, **options}
        return openai.AsyncOpenAI(**settings)

    def auth(self) -> dict[str, str]:
        """Headers for a plain HTTP client."""
        return {"authorization": f"Bearer {self.endpoint.api_key}"}


@pytest.fixture
def serve(renderer: ChatRenderer, tokenizer: Any) -> Iterator[Callable[..., Served]]:
    """``serve(script, **client options)`` or ``serve(sampling_client=…)``: an endpoint, closed when the test ends."""
    started: list[PolicyEndpoint] = []

    def start(
        script: Any = None,
        *,
        sampling_client: Any = None,
        get_client: Any = None,
        renderer: ChatRenderer = renderer,
        api_key: str | None = None,
        hints: Any = "ignore",
        **options: Any,
    ) -> Served:
        sampling = sampling_client or ScriptedSamplingClient(tokenizer, script, **options)
        recorder = Recorder()
        endpoint = PolicyEndpoint(
            renderer=lambda: renderer,
            sampling_client=get_client or (lambda: sampling),
            recorder=recorder,
            defaults=lambda kind: SamplingDefaults(1.0 if kind == "rollout" else 0.0, 1.0, 64),
            model_names=[MODEL],
            api_key=api_key,
            hints=hints,
        )
        endpoint.start()
        started.append(endpoint)
        return Served(endpoint, recorder, sampling)

    yield start
    for endpoint in started:
        endpoint.close()
