"""Spans that NAT sent to an OpenTelemetry collector, as its ``file`` exporter writes them: OTLP's JSON, a batch a line.

A span of NAT has what its two intermediate steps had, so it is read as those.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from nat_plugin_evsys.rollouts.traces.steps import Step

BATCH = "resourceSpans"
"""What a line of the exporter has."""

_EVENT = ".event_type"


def steps_of_batches(batches: list[Mapping[str, Any]]) -> list[Step]:
    """The steps of NAT's spans, in the order in which they began; spans of others are left out."""
    spans = [span for batch in batches for span in _spans(batch)]
    spans.sort(key=lambda span: int(span.get("startTimeUnixNano") or 0))
    return [step for span in spans for step in _steps(span)]


def _spans(batch: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for resource in batch.get(BATCH) or []:
        for scope in resource.get("scopeSpans") or []:
            yield from scope.get("spans") or []


def _steps(span: Mapping[str, Any]) -> Iterator[Step]:
    said = {each["key"]: next(iter(each["value"].values()), None) for each in span.get("attributes") or []}
    prefix = next((key.removesuffix(_EVENT) for key in said if key.endswith(_EVENT)), None)
    if prefix is None:
        return
    metadata = _json(said.get(f"{prefix}.metadata")) or {}
    run, kind = said.get(f"{prefix}.workflow.run_id"), str(said[f"{prefix}{_EVENT}"]).removesuffix("_START")
    workflow = kind == "WORKFLOW"
    common = {
        "UUID": run if workflow else span.get("spanId"),
        "name": said.get("llm.model_name") or said.get(f"{prefix}.subspan.name"),
        "metadata": metadata,
    }
    question = metadata.get("chat_inputs") or said.get("input.value")
    usage = {
        "prompt_tokens": int(said.get("llm.token_count.prompt") or 0),
        "completion_tokens": int(said.get("llm.token_count.completion") or 0),
    }
    where = {
        "parent_id": "root" if workflow else run,
        "function_ancestry": {"function_name": said.get(f"{prefix}.function.name")},
    }
    yield {**where, "payload": {**common, "event_type": f"{kind}_START", "data": {"input": question}}}
    ended = {"data": {"output": said.get("output.value")}, "usage_info": {"token_usage": usage}}
    yield {**where, "payload": {**common, "event_type": f"{kind}_END", **ended}}


def _json(text: Any) -> Any:
    try:
        return json.loads(text) if isinstance(text, str) else text
    except json.JSONDecodeError:
        return None
