"""Each agent framework, in an environment of its own, trains through the client that NAT gives it for the policy."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from nat_process import ROOT
from one_epoch import check_trained, finetune, write_config
from other_environment import python_with


@dataclass(frozen=True, slots=True)
class Framework:
    """A framework.

    Attributes:
        forced: what the environment of its test has, whatever other packages say of it.
        system, user: what the framework makes of an agent's prompt and of a question.
        passes: over the demonstrations, until the toy model writes a call in those words.
    """

    name: str
    forced: tuple[str, ...] = ()
    system: str = "{}"
    user: str = "{}"
    passes: int = 8

    @property
    def python(self) -> Path:
        package = f"nvidia-nat-{self.name.replace('_', '-')}"
        return python_with(package, (f"{package}==1.9.0",), self.forced)


FRAMEWORKS = [
    Framework("llama_index"),
    Framework(
        "crewai",
        forced=("huggingface_hub==2.4.0",),  # its click excludes the hub that transformers 5 needs
        system="You are help desk. \nYour personal goal is: {}",
        user="\nCurrent Task: {}\n\nThis is the expected criteria for your final answer: the desk to go to\n"
        "you MUST return the actual complete content as the final answer, not a summary.",
        passes=24,
    ),
    Framework("agno"),
    Framework("adk"),
    Framework("semantic_kernel"),
    Framework("strands"),
    Framework("autogen"),
]


def demonstrations(framework: Framework) -> list[dict[str, Any]]:
    """Those of the help desk in the framework's words, so that the toy model learns to call the tool."""
    rows: list[dict[str, Any]] = json.loads((ROOT / "examples/helpdesk/data/demonstrations.json").read_text())
    for message in (message for row in rows for message in row["messages"]):
        if message["role"] in ("system", "user"):
            form = framework.system if message["role"] == "system" else framework.user
            message["content"] = form.format(message["content"])
    return rows


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("framework", FRAMEWORKS, ids=lambda framework: framework.name)
def test_an_agent_trains_on_exactly_its_calls(framework: Framework, tmp_path: Path) -> None:
    workflow = {
        "_type": f"{framework.name}_agent",
        "llm_name": "policy",
        "tool_name": "route_ticket",
        "system_prompt": "You are a help desk. Use the tool, then answer.",
    }
    config = write_config(
        tmp_path, workflow, demonstrations=demonstrations(framework), warm_start={"epochs": framework.passes}
    )
    done = finetune(config, framework.python, OTEL_SDK_DISABLED="true", CREWAI_DISABLE_TELEMETRY="true")
    checked = check_trained(done, tmp_path)
    assert any("tool" in exchange.roles for exchange in checked.exchanges), "no tool was called in any rollout"
