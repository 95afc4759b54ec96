"""Acceptance: what is trained on is, id for id, what went over the wire, for agents that stream and call tools."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from nat_process import CAPTURE_DIR, ROOT, first_rows, json_lines, newest_run, run_nat


def read_exchange(record: dict[str, Any]) -> dict[str, Any]:
    """``{id, prompt, output, finish_reason, run_id}`` of a captured exchange, plain or streamed."""
    if not record["request"].get("stream"):
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
    return {
        "id": identity,
        "prompt": prompt,
        "output": output,
        "finish_reason": finish,
        "run_id": record["headers"].get("x-evsys-run-id"),
    }


@pytest.mark.parametrize(
    ("name", "workflow", "streaming"),
    [
        ("helpdesk_tools", "tool_calling_agent", False),
        ("helpdesk_tools", "tool_calling_agent", True),
        ("react", "react_agent", True),
    ],
)
def test_trained_tokens_are_the_tokens_on_the_wire(
    name: str, workflow: str, streaming: bool, tmp_path: Path, make_config: Callable[..., Path]
) -> None:
    held_out: list[Path] = []

    def change(config: dict[str, Any]) -> None:
        assert config["workflow"]["_type"] == workflow
        config["llms"]["policy"]["disable_streaming"] = not streaming
        config["trajectory_builders"]["builder"]["num_generations"] = 4
        config["trainer_adapters"]["adapter"]["save_datums"] = True
        config["trainers"]["trainer"]["validation_interval"] = 1
        held_out.append(ROOT / config["trainers"]["trainer"].pop("validation_dataset"))

    config = make_config(name, change)
    settings = yaml.safe_load(config.read_text())
    train = ROOT / settings["eval"]["general"]["dataset"]["file_path"]
    capture = tmp_path / "http.jsonl"
    done = run_nat(
        "finetune",
        "--config_file",
        str(config),
        "--dataset",
        str(first_rows(train, 6, tmp_path / "train.json")),
        "--validation_dataset",
        str(first_rows(held_out[0], 3, tmp_path / "heldout.json")),
        "-o",
        "finetuning.num_epochs",
        "2",
        PYTHONPATH=str(CAPTURE_DIR),
        EVSYS_TEST_HTTP_CAPTURE=str(capture),
    )
    assert done.code == 0, done.text[-4000:]
    assert "RecursionError" not in done.text

    records = json_lines(capture)
    assert any(bool(record["request"].get("stream")) for record in records) == streaming
    exchanges = [read_exchange(record) for record in records if record["status"] == 200]
    on_wire = {exchange["id"]: exchange for exchange in exchanges}
    assert len(on_wire) == len(exchanges)
    assert all(exchange["run_id"] for exchange in exchanges)

    run = newest_run(tmp_path)
    datums = [row for path in run.glob("datums-*.jsonl") for row in json_lines(path)]
    assert datums
    trained_calls = set()
    for datum in datums:
        tokens = [datum["model_input"][0], *datum["target_tokens"]]
        assert tokens[:-1] == datum["model_input"]
        calls = [on_wire[call["call_id"]] for call in datum["calls"]]
        assert len({call["run_id"] for call in calls}) == 1
        assert tokens == calls[-1]["prompt"] + calls[-1]["output"]
        sampled = set()
        for call in calls:
            start = len(call["prompt"])
            assert tokens[: start + len(call["output"])] == call["prompt"] + call["output"]
            sampled |= set(range(start, start + len(call["output"])))
        trained = {row + 1 for row, advantage in enumerate(datum["advantages"]) if advantage != 0}
        assert trained == sampled
        trained_calls |= {call["id"] for call in calls}

    summary = json.loads((run / "summary.json").read_text())
    assert summary["trained"] == len(trained_calls)
    assert summary["calls"] == len(exchanges) == summary["trained"] + sum(summary["dropped"].values())
    if workflow == "tool_calling_agent":
        assert any(len(datum["calls"]) > 1 for datum in datums), "no two turns of an episode were merged"
