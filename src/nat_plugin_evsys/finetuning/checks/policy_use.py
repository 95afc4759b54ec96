"""Whether the workflow can reach the policy, as far as its configuration tells."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from nat_plugin_evsys.errors import ConfigError

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
    if policy_name in {text for part in parts for text in _texts(part)} or any(map(_may_call_anything, parts)):
        return
    used = sorted({str(ref) for part in parts for ref in _llm_refs(part)})
    seen = f"uses {used}" if used else "names no LLM"
    raise ConfigError(
        f"the workflow {seen}, not the policy `{policy_name}`, so nothing would be trained; "
        f"set `workflow.llm_name: {policy_name}`"
    )


def _may_call_anything(part: BaseModel) -> bool:
    own = type(part).__module__.split(".")[0] == "nat"
    return not own or getattr(part, "type", None) in _RUNS_FOREIGN_CODE


def _llm_refs(value: Any) -> Iterator[str]:
    from nat.data_models.component_ref import LLMRef

    return (text for text in _texts(value) if isinstance(text, LLMRef))


def _texts(value: Any) -> Iterator[str]:
    """Every string that a configuration holds at whatever depth; a reference is one too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _texts(getattr(value, name))
        yield from _texts(value.model_extra or {})
    elif isinstance(value, dict):
        yield from _texts(list(value.values()))
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from _texts(item)
