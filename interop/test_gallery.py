"""The agents of NAT's own gallery, each finetuned for an epoch, or refused with the reason."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from nat_process import ROOT, newest_run
from one_epoch import check_trained, finetune, write_config

TEAMS = ("network", "printing", "accounts", "payroll")
SYSTEM_PROMPT = "You are a help desk. Use the tool, then answer."
PLANNER_PROMPT = "Plan with the tools {tool_names}.\n{tools}"


def asks(system_prompt: str, description: str = "Answers a caller.") -> dict[str, Any]:
    """NAT's function that asks the LLM once."""
    return {
        "_type": "chat_completion",
        "llm_name": "policy",
        "system_prompt": system_prompt,
        "description": description,
    }


def plans() -> list[dict[str, Any]]:
    """Demonstrations of a ReWOO plan, which is JSON."""
    tool = (
        "route_ticket: Route the ticket to a team. Returns its desk.. . Arguments must be provided as a valid JSON "
        "object following this format: {'team': FieldInfo(annotation=Literal['network', 'printing', 'accounts', "
        "'payroll'], required=True)}"
    )
    system = PLANNER_PROMPT.format(tool_names="route_ticket", tools=tool)
    rows = json.loads((ROOT / "examples/helpdesk/data/tools_train.json").read_text())
    evidence = {"placeholder": "#E1", "tool": "route_ticket", "tool_input": {"team": "network"}}
    plan = json.dumps([{"plan": "Route it.", "evidence": evidence}])
    return [
        {
            "messages": [
                {"role": "system", "content": system},
                {"role": "user", "content": f"\nPrevious conversation history:\n\n\ntask: {row['question']}\n"},
                {"role": "assistant", "content": plan},
            ]
        }
        for row in rows
    ]


@dataclass(frozen=True, slots=True)
class Example:
    """A workflow, the functions beside ``route_ticket``, what the toy model is shown first, the policy's settings."""

    name: str
    workflow: dict[str, Any]
    functions: dict[str, Any] = field(default_factory=dict)
    demonstrations: list[dict[str, Any]] | None = None
    policy: dict[str, Any] = field(default_factory=dict)


REACT = {
    "llm_name": "policy",
    "tool_names": ["route_ticket"],
    "max_tool_calls": 2,
    "parse_agent_response_max_retries": 1,
}
TOOL_CALLING = {
    "_type": "tool_calling_agent",
    "llm_name": "policy",
    "tool_names": ["route_ticket"],
    "system_prompt": SYSTEM_PROMPT,
    "max_iterations": 2,
    "description": "Answers a caller with the desk to go to.",
}
RESPONSES = {"_type": "responses_api_agent", "llm_name": "policy", "nat_tools": ["route_ticket"]}
REACT_POLICY = {"temperature": 0.3, "max_tokens": 48}

GALLERY = [
    Example("react", {"_type": "react_agent", "raise_on_parsing_failure": False, **REACT}, policy=REACT_POLICY),
    Example("tool_calling", TOOL_CALLING),
    Example(
        "rewoo",
        {
            "_type": "rewoo_agent",
            "llm_name": "policy",
            "tool_names": ["route_ticket"],
            "planner_prompt": PLANNER_PROMPT,
            "solver_prompt": "Answer with the desk.",
        },
        demonstrations=plans(),
        policy={"temperature": 0.3, "max_tokens": 96},
    ),
    Example(
        "reasoning",
        {"_type": "reasoning_agent", "llm_name": "policy", "augmented_fn": "desk"},
        {"desk": TOOL_CALLING},
    ),
    Example(
        "router",
        {"_type": "router_agent", "llm_name": "policy", "branches": [*TEAMS]},
        {team: asks(f"You are the {team} team.", f"Questions for the {team} team.") for team in TEAMS},
    ),
    Example(
        "sequential",
        {"_type": "sequential_executor", "tool_list": ["summary", "desk"]},
        {"summary": asks("Say it in a few words."), "desk": asks("You are a help desk.")},
    ),
    Example(
        "parallel",
        {"_type": "parallel_executor", "tool_list": ["summary", "desk"]},
        {"summary": asks("Say it in a few words."), "desk": asks("You are a help desk.")},
    ),
    Example("per_user", {"_type": "per_user_react_agent", **REACT}, policy=REACT_POLICY),
    Example(
        "langgraph_wrapper",
        {"_type": "langgraph_wrapper", "graph": f"{ROOT / 'interop' / 'gallery_graph.py'}:graph"},
    ),
]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("example", GALLERY, ids=lambda example: example.name)
def test_an_agent_of_the_gallery_trains(example: Example, tmp_path: Path) -> None:
    warm_start = {"epochs": 30, "learning_rate": 5.0e-3}  # as configs/react.yml
    config = write_config(
        tmp_path, example.workflow, example.functions, example.demonstrations, warm_start, **example.policy
    )
    check_trained(finetune(config), tmp_path)


@pytest.mark.timeout(1800)
def test_the_responses_api_agent_trains(tmp_path: Path) -> None:
    done = finetune(write_config(tmp_path, RESPONSES, api_type="responses"))
    assert done.code == 0, done.text[-4000:]
    summary = json.loads((newest_run(tmp_path) / "summary.json").read_text())
    print({key: summary[key] for key in ("calls", "trained", "dropped", "prompts")})
    assert summary["trained"] > 0
    assert summary["calls"] == summary["trained"] + sum(summary["dropped"].values())


@pytest.mark.timeout(1800)
def test_the_responses_api_agent_is_refused_without_its_api(tmp_path: Path) -> None:
    """NAT asserts that its LLM speaks the Responses API."""
    done = finetune(write_config(tmp_path, RESPONSES))
    assert done.code == 1
    assert "Responses API Agent requires an LLM that supports the Responses API" in done.text
