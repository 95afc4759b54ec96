"""What an operator looks at: metrics, logs, status."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from click.testing import CliRunner, Result
from prometheus_client.parser import text_string_to_metric_families
from serve_process import ALICE, BOB, ServerProcess

from nat_plugin_evsys.cli import runs as cli


def values(server: ServerProcess) -> dict[tuple[str, ...], float]:
    """Each sample of /metrics by its name and label values, in the order of the labels' names."""
    text = httpx.get(f"{server.url}/metrics", headers={"x-api-key": ALICE}).text
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_count_requests_by_route_and_operations_by_result(
    keyed_server: ServerProcess, served_model: Path, wire: Callable[..., Any]
) -> None:
    before = values(keyed_server)
    client = wire(keyed_server.url, ALICE)
    session = client.session()
    model = client.model(session, str(served_model))
    client.result(client.post("save_weights", model_id=model, seq_id=1, path="a"))
    assert "error" in client.result(client.post("save_weights", model_id=model, seq_id=2, path="../x"))
    client.http.get(f"/api/v1/sessions/{session}")
    client.http.get("/not/a/route")
    after = values(keyed_server)

    def grew(*sample: str) -> float:
        return after.get(sample, 0.0) - before.get(sample, 0.0)

    assert grew("evsys_http_requests_total", "POST", "/api/v1/save_weights", "200") == 2
    assert grew("evsys_http_requests_total", "GET", "/api/v1/sessions/{session_id}", "200") == 1
    assert grew("evsys_http_requests_total", "GET", "unmatched", "404") == 1
    assert grew("evsys_http_request_seconds_count", "/api/v1/create_model") == 1
    assert grew("evsys_operations_submitted_total", "save_weights") == 2
    assert grew("evsys_operations_finished_total", "save_weights", "ok") == 1
    assert grew("evsys_operations_finished_total", "save_weights", "failed") == 1
    assert not any(session in part for sample in after for part in sample)
    assert after[("evsys_models", "loaded")] >= 1
    assert after[("evsys_memory_bytes", "resident")] > 50e6
    assert sum(v for k, v in after.items() if k[0] == "evsys_operations_queued") == 0


def test_tokens_and_engine_seconds_are_counted(
    keyed_server: ServerProcess, served_model: Path, wire: Callable[..., Any]
) -> None:
    client = wire(keyed_server.url, ALICE)
    before = values(keyed_server)
    chat = {"model": str(served_model), "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
    reply = client.http.post("/v1/chat/completions", json=chat).json()
    after = values(keyed_server)
    sampled = ("evsys_tokens_total", "chat")
    assert after[sampled] - before[sampled] == reply["usage"]["completion_tokens"]


def test_a_request_is_one_json_line_with_its_id(keyed_server: ServerProcess) -> None:
    headers = {"x-api-key": ALICE, "x-request-id": "my-request-17"}
    answer = httpx.get(f"{keyed_server.url}/api/v1/sessions?secret=1", headers=headers)
    assert answer.headers["x-request-id"] == "my-request-17"
    made_up = httpx.get(f"{keyed_server.url}/healthz", headers={"x-request-id": "a\tb" * 3})
    assert made_up.headers["x-request-id"] != "a\tb" * 3
    lines = [json.loads(line) for line in keyed_server.log.read_text().splitlines() if line.startswith("{")]
    found = [line for line in lines if line.get("request_id") == "my-request-17"]
    assert len(found) == 1
    line = found[0]
    assert (line["method"], line["path"], line["status"]) == ("GET", "/api/v1/sessions", 200)
    assert line["ms"] >= 0
    assert len(line["owner"]) == 16
    assert "secret" not in keyed_server.log.read_text()


def test_status_is_a_table_of_ones_own_models(
    keyed_server: ServerProcess, served_model: Path, wire: Callable[..., Any]
) -> None:
    model = wire(keyed_server.url, ALICE).model(wire(keyed_server.url, ALICE).session(), str(served_model))

    def status(key: str, *options: str) -> str:
        return call("--url", keyed_server.url, "--api-key", key, *options).output

    table = status(ALICE)
    assert f"base models   {served_model}" in table
    line = next(line for line in table.splitlines() if line.startswith(model))
    assert line.split()[2] == "loaded"
    assert "resident" in table
    assert model not in status(BOB)
    assert model in [each["model_id"] for each in json.loads(status(ALICE, "--json"))["models"]]
    assert "answered 401" in status("tml-unknown-0123456789")


def test_status_of_nothing_says_so() -> None:
    result = call("--url", "http://127.0.0.1:9")
    assert result.exit_code == 1
    assert "is `nat evsys serve` running there?" in result.output


def call(*arguments: str) -> Result:
    return CliRunner().invoke(cli.evsys, ["status", *arguments])
