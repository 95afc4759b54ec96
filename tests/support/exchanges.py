"""What went over the wire against what was trained on, token id for token id; the wire is seen by ``http_capture``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nat_process import json_lines


@dataclass(frozen=True, slots=True)
class Exchange:
    """One chat completion as its client saw it, plain or streamed."""

    id: str
    prompt: list[int]
    output: list[int]
    finish_reason: str
    run_id: str | None
    roles: tuple[str, ...]
    temperature: float | None
    streamed: bool


@dataclass(frozen=True, slots=True)
class Checked:
    """A run whose Datums are the exchanges of its rollouts."""

    exchanges: list[Exchange]
    datums: list[dict[str, Any]]
    summary: dict[str, Any]


def read_exchanges(capture: Path) -> list[Exchange]:
    """The exchanges that were answered."""
    return [_read(record) for record in json_lines(capture) if record["status"] == 200]


def check_token_exact(capture: Path, run: Path) -> Checked:
    """Assert that each Datum of a run (``save_datums``) is what was sent and received, and that no call is missing.

    All that was sampled is trained on, but for the tokens that a grammar forced.
    """
    exchanges = read_exchanges(capture)
    on_wire = {exchange.id: exchange for exchange in exchanges}
    assert len(on_wire) == len(exchanges)
    datums = [row for path in run.glob("datums-*.jsonl") for row in json_lines(path)]
    assert datums
    trained_calls = set()
    for datum in datums:
        tokens = [datum["model_input"][0], *datum["target_tokens"]]
        assert tokens[:-1] == datum["model_input"]
        calls = [on_wire[call["call_id"]] for call in datum["calls"]]
        assert len({call.run_id for call in calls}) == 1
        assert tokens == calls[-1].prompt + calls[-1].output
        sampled = set()
        forced = {row + 1 for call in datum["calls"] for row in call["forced"]}
        for call in calls:
            start = len(call.prompt)
            assert tokens[: start + len(call.output)] == call.prompt + call.output
            sampled |= set(range(start, start + len(call.output)))
        trained = {row + 1 for row, advantage in enumerate(datum["advantages"]) if advantage != 0}
        assert trained == sampled - forced
        trained_calls |= {call.id for call in calls}

    summary = json.loads((run / "summary.json").read_text())
    assert summary["trained"] == len(trained_calls)
    assert summary["calls"] == len(exchanges) == summary["trained"] + sum(summary["dropped"].values())
    return Checked(exchanges, datums, summary)


def _read(record: dict[str, Any]) -> Exchange:
    request = record["request"]
    if not request.get("stream"):
        body = json.loads(record["response"])
        (choice,) = body["choices"]
        prompt, output, finish = body["prompt_token_ids"], choice["token_ids"], choice["finish_reason"]
        identity = body["id"]
    else:
        lines = [line[6:] for line in record["response"].splitlines() if line.startswith("data: ")]
        assert lines[-1] == "[DONE]"
        chunks = [json.loads(line) for line in lines[:-1]]
        prompt = next(chunk["prompt_token_ids"] for chunk in chunks if chunk.get("prompt_token_ids"))
        choices = [choice for chunk in chunks for choice in chunk["choices"]]
        output = [token for choice in choices for token in choice.get("token_ids") or []]
        finish = next(choice["finish_reason"] for choice in choices if choice.get("finish_reason"))
        identity = chunks[0]["id"]
    return Exchange(
        id=identity,
        prompt=prompt,
        output=output,
        finish_reason=finish,
        run_id=record["headers"].get("x-evsys-run-id"),
        roles=tuple(message["role"] for message in request["messages"]),
        temperature=request.get("temperature"),
        streamed=bool(request.get("stream")),
    )
