"""The clients that are tested, and the environments that they are installed in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from other_environment import python_with


@dataclass(frozen=True, slots=True)
class Client:
    """A client.

    Attributes:
        needs: what it is installed with; nothing if the project has it.
        forced: installed after that, whatever other packages say of it.
        lacks: what it has no call of its own for.
    """

    name: str
    needs: tuple[str, ...] = ()
    forced: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()

    @property
    def python(self) -> Path | None:
        """The interpreter of its environment, which is made once; None is the project's own."""
        return python_with(f"client-{self.name}", self.needs, self.forced) if self.needs else None


CLIENTS = [
    Client("openai"),
    Client("langchain"),
    Client("openai_agents", ("openai-agents>=0.3",)),
    Client("pydantic_ai", ("pydantic-ai-slim[openai]>=1",)),
    Client("litellm", ("litellm>=1.70",)),
    Client("instructor", ("instructor>=1.10",), lacks=("chat", "stream", "tool")),
    Client("smolagents", ("smolagents[openai]>=1.20",)),
    Client("llama_index", ("llama-index-llms-openai-like>=0.4",)),
    Client("strands", ("strands-agents[openai]>=1",)),
    Client("adk", ("google-adk>=1", "litellm>=1.70")),
    Client("dspy", ("dspy>=3",), lacks=("stream",)),
    Client("crewai", ("crewai[litellm]>=1",), ("huggingface_hub==2.4.0",)),
]

MOST_USED = ("openai", "langchain", "openai_agents", "pydantic_ai")
"""Those that continuous integration tests."""
