"""``nat evsys serve --ray``: the official SDK, unmodified, against a server whose models are replicas."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from nat_process import run_nat
from sdk_report import sdk_report
from serve_process import ServerProcess, add_chat_template, start_server
from tiny import save_byte_model

pytest.importorskip("ray", reason="needs Ray: make test-ray")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_chat_template(save_byte_model(tmp_path_factory.mktemp("served") / "tiny"))


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    store = tmp_path_factory.mktemp("ray") / "store"
    running = start_server(model, store, "--ray", "--replicas", "2", "--gpus-per-replica", "0", "--poll-seconds", "3")
    yield running
    assert running.stop() == 0
    assert "SIGTERM received" not in running.log.read_text()  # Ray's own handler, with a stack


def replicas(server: ServerProcess) -> list[dict[str, Any]]:
    status = run_nat("evsys", "status", "--url", server.url, "--json")
    found: list[dict[str, Any]] = json.loads(status.out)["replicas"]
    return found


def test_every_call_of_the_sdk_does_what_it_says(server: ServerProcess, model: Path) -> None:
    assert sdk_report(server.url, model, timeout=240)["problems"] == []
    both = replicas(server)
    assert [each["state"] for each in both] == ["up", "up"]
    assert all(each["tokens"] > 0 for each in both)


def test_the_status_shows_the_replicas_and_one_that_was_killed(server: ServerProcess, model: Path) -> None:
    for each in replicas(server):
        os.kill(each["pid"], signal.SIGKILL)
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="tml-local", max_retries=0, timeout=120)
    messages: Any = [{"role": "user", "content": "hi"}]
    for _ in range(2):
        assert client.chat.completions.create(model=str(model), messages=messages, max_tokens=8).choices
    shown = run_nat("evsys", "status", "--url", server.url).out
    assert "REPLICA" in shown
    assert "TOKENS/S" in shown
    assert max(each["restarts"] for each in replicas(server)) == 1


def test_an_operator_removes_and_adds_replicas_while_clients_sample(server: ServerProcess, model: Path) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="tml-local", max_retries=0, timeout=120)
    asked: Any = {"model": str(model), "messages": [{"role": "user", "content": "hi"}], "max_tokens": 48, "seed": 1}

    def reply(_: int) -> str | None:
        return client.chat.completions.create(**asked).choices[0].message.content

    expected = reply(0)
    for count in (1, 2):
        with ThreadPoolExecutor(4) as executor:
            replies = [executor.submit(reply, number) for number in range(12)]
            done = run_nat("evsys", "scale", str(count), "--url", server.url)
            assert [each.result() for each in replies] == [expected] * 12
        assert done.code == 0, done.text
        assert sum(line.split()[2:3] == ["up"] for line in done.out.splitlines()) == count
        assert [each["state"] for each in replicas(server)] == ["up"] * count
    refused = run_nat("evsys", "scale", "99", "--url", server.url, "--base-model", str(model))
    assert refused.code == 1
    assert "97 more replicas with 1 CPU each needs 97 CPU" in refused.err
    assert "is not served here" in run_nat("evsys", "scale", "1", "--url", server.url, "--base-model", "x").err
    assert len(replicas(server)) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--replicas", "2"], "--replicas has no effect without --ray"),
        (["--ray"], "--ray needs --replicas N"),
        (["--ray", "--replicas", "1", "--gpus-per-replica", "2"], "is trained, not sampled from"),
    ],
)
def test_options_that_cannot_take_effect_are_refused(options: list[str], message: str) -> None:
    refused = run_nat("evsys", "serve", "--base-model", "builtin/tiny", *options)
    assert refused.code != 0
    assert message in refused.err
