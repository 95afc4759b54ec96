"""Whether the workflow can reach the policy, as far as its configuration tells."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pydantic import BaseModel

from nat_plugin_evsys.config import EvsysPolicyConfig
from nat_plugin_evsys.errors import ConfigError
from nat_plugin_evsys.finetuning.checks.references import reachable_texts, texts

if TYPE_CHECKING:
    from nat.data_models.config import Config

_SECTIONS = ("functions", "function_groups", "middleware", "ttc_strategies", "memory", "retrievers", "object_stores")
"""Sections whose components a workflow may call, and which may call an LLM."""

_RUNS_FOREIGN_CODE = frozenset({"langgraph_wrapper"})
"""NAT's components that run code of the user's."""


def check_workflow_uses(config: Config, policy_name: str) -> None:
    """Refuse a workflow of NAT's own components that all ask other LLMs: nothing of it would be trained.

    Components of others are not refused: they may name the LLM in any field, or none, and call the policy by
    ``policy_endpoint()``. Their first rollouts tell (see ``batch_check``).

    Raises:
        ConfigError: names the LLMs that are used, and the setting to change.
    """
    parts = [config.workflow, *(part for name in _SECTIONS for part in getattr(config, name).values())]
    if policy_name in {text for part in parts for _, text in texts(part)} or any(map(_may_call_anything, parts)):
        return
    policy = config.llms[policy_name]
    if isinstance(policy, EvsysPolicyConfig) and policy.port:
        return  # its address is known ahead of time: any client may call it
    used = sorted({str(ref) for part in parts for ref in _llm_refs(part)})
    seen = f"uses {used}" if used else "names no LLM"
    raise ConfigError(
        f"the workflow {seen}, not the policy `{policy_name}`, so nothing would be trained; "
        f"set `workflow.llm_name: {policy_name}`"
    )


def judge_notice(config: Config, reward_name: str, policy_name: str) -> str | None:
    """What to say where the evaluator that rewards the policy asks the policy; None where it asks no one or others."""
    reward = config.eval.evaluators[reward_name]
    path, policy = f"eval.evaluators.{reward_name}", config.llms[policy_name]
    for setting, text in reachable_texts(config, path, reward):
        if text == policy_name or config.llms.get(text) == policy:
            return (
                f"{setting} is `{text}`: the policy rewards itself, and its judgement changes while it is trained. Its "
                "calls as a judge are not trained on (unattributed). Name another LLM, or an evsys_policy with "
                "`checkpoint: none`, which is the base model"
            )
    return None


def _may_call_anything(part: BaseModel) -> bool:
    own = type(part).__module__.split(".")[0] == "nat"
    return not own or getattr(part, "type", None) in _RUNS_FOREIGN_CODE


def _llm_refs(part: BaseModel) -> Iterator[str]:
    from nat.data_models.component_ref import LLMRef

    return (text for _, text in texts(part) if isinstance(text, LLMRef))
