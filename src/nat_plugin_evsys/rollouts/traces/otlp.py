"""Spans that NAT sent to an OpenTelemetry collector, as its ``file`` exporter writes them: OTLP's JSON, a batch a line.

A span of NAT has what its two intermediate steps had, so it is read as those.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from nat_plugin_evsys.rollouts.traces.steps import Step, is_step

BATCH = "resourceSpans"
"""What a line of the exporter has."""

_EVENT, _RUN = ".event_type", ".workflow.run_id"


def spans_of(batch: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The spans of a line."""
    scopes = [scope for resource in batch.get(BATCH) or [] for scope in resource.get("scopeSpans") or []]
    return [span for scope in scopes for span in scope.get("spans") or []]


def steps_of(span: Mapping[str, Any]) -> tuple[int, list[Step]]:
    """When a span began, in nanoseconds, and its steps; a span that is not NAT's has none."""
    steps = list(_steps(span))
    if not all(map(is_step, steps)):
        raise TypeError("the id of a span or of its run is no text")
    return int(span.get("startTimeUnixNano") or 0), steps


def run_of(span: Any) -> str | None:
    """The run that a span is of, also if the rest of it cannot be read; None if that does not say."""
    given = span.get("attributes") if isinstance(span, Mapping) else None
    attributes = [each for each in given if isinstance(each, Mapping)] if isinstance(given, list) else []
    runs = [_value(each) for each in attributes if str(each.get("key")).endswith(_RUN)]
    return next((run for run in runs if isinstance(run, str)), None)


def _steps(span: Mapping[str, Any]) -> Iterator[Step]:
    said = {each["key"]: _value(each) for each in span.get("attributes") or []}
    prefix = next((key.removesuffix(_EVENT) for key in said if key.endswith(_EVENT)), None)
    if prefix is None:
        return
    metadata = _json(said.get(f"{prefix}.metadata")) or {}
    run, kind = said.get(f"{prefix}{_RUN}"), str(said[f"{prefix}{_EVENT}"]).removesuffix("_START")
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
    function = {name: str(said.get(f"{prefix}.function.{name}") or "") for name in ("id", "name")}
    where = {
        "parent_id": "root" if workflow else run,
        "function_ancestry": {"function_id": function["id"], "function_name": function["name"]},
    }
    yield {**where, "payload": {**common, "event_type": f"{kind}_START", "data": {"input": question}}}
    ended = {"data": {"output": said.get("output.value")}, "usage_info": {"token_usage": usage}}
    yield {**where, "payload": {**common, "event_type": f"{kind}_END", **ended}}


def _value(attribute: Mapping[str, Any]) -> Any:
    """What an attribute says; OTLP's JSON leaves an empty value out."""
    return next(iter((attribute.get("value") or {}).values()), None)


def _json(text: Any) -> Any:
    try:
        return json.loads(text) if isinstance(text, str) else text
    except json.JSONDecodeError:
        return None
