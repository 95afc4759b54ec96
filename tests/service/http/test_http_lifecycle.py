"""Starting, stopping, dying and coming back; order, repeats and long polls."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from serve_process import ServerProcess

from nat_plugin_evsys.errors import ConfigError
from nat_plugin_evsys.web.listen import bind

TTL_BODY: dict[str, Any] = {"adam_params": {"learning_rate": 1e-3}}


def test_the_line_on_stdout_says_what_to_export(open_server: ServerProcess, served_model: Path) -> None:
    (line,) = open_server.out.read_text().splitlines()
    assert line.startswith(f"serving {served_model} at {open_server.url} ")
    assert f"export TINKER_BASE_URL={open_server.url} TINKER_API_KEY=tml-local" in line


def test_a_repeat_gets_the_id_of_the_first_request(
    open_server: ServerProcess, served_model: Path, wire: Callable[..., Any]
) -> None:
    client = wire(open_server.url)
    session = client.session()
    create = {"session_id": session, "model_seq_id": 0, "base_model": str(served_model), "lora_config": {"rank": 2}}
    first, second = client.post("create_model", **create), client.post("create_model", **create)
    assert first.json() == second.json()
    model = client.result(first)["model_id"]
    saves = [client.post("save_weights", model_id=model, seq_id=1, path="once").json() for _ in range(3)]
    assert saves[0] == saves[1] == saves[2]
    sampler = client.post(
        "create_sampling_session", session_id=session, sampling_session_seq_id=0, base_model=str(served_model)
    ).json()["sampling_session_id"]
    ask = {
        "sampling_session_id": sampler,
        "seq_id": 9,
        "num_samples": 2,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [65, 66]}]},
        "sampling_params": {"max_tokens": 2},
    }
    first, second = client.post("asample", **ask), client.post("asample", **ask)
    assert first.json() == second.json()
    assert len(set(first.json()["sample_sequence_ids"])) == 2


def test_the_number_of_a_sampling_session_names_one_sampler(
    open_server: ServerProcess, served_model: Path, wire: Callable[..., Any]
) -> None:
    client = wire(open_server.url)
    session = client.session()
    model = client.model(session, str(served_model))
    path = client.result(client.post("save_weights_for_sampler", model_id=model, seq_id=1, path="one"))["path"]
    numbered = {"session_id": session, "sampling_session_seq_id": 0}
    of_base = client.post("create_sampling_session", **numbered, base_model=str(served_model))
    assert client.post("create_sampling_session", **numbered, base_model=str(served_model)).json() == of_base.json()
    taken = client.post("create_sampling_session", **numbered, model_path=path)
    assert taken.status_code == 400
    assert "sampling_session_seq_id 0 is taken" in taken.json()["error"]


def test_a_later_operation_waits_for_the_one_before_it(
    open_server: ServerProcess, served_model: Path, wire: Callable[..., Any]
) -> None:
    client = wire(open_server.url)
    model = client.model(client.session(), str(served_model))
    second = client.post("save_weights", model_id=model, seq_id=2, path="b")
    started = time.monotonic()
    poll = client.post("retrieve_future", request_id=second.json()["request_id"])
    assert poll.status_code == 408
    assert poll.json() == {"type": "try_again", "request_id": second.json()["request_id"], "queue_state": "active"}
    assert 2.5 < time.monotonic() - started < 10
    client.post("save_weights", model_id=model, seq_id=1, path="a")
    assert client.result(second)["path"] == f"tinker://{model}/weights/b"


def test_an_unknown_base_model_fails_the_future_or_names_those_served(
    open_server: ServerProcess, served_model: Path, wire: Callable[..., Any]
) -> None:
    client = wire(open_server.url)
    session = client.session()
    sent = client.post("create_model", session_id=session, model_seq_id=0, base_model="Qwen/Qwen3-8B")
    failure = client.result(sent)
    assert failure["category"] == "user"
    assert str(served_model) in failure["error"]
    answer = client.post(
        "create_sampling_session", session_id=session, sampling_session_seq_id=0, base_model="Qwen/Qwen3-8B"
    )
    assert answer.status_code == 400
    assert str(served_model) in answer.json()["error"]
    assert client.post("optim_step", model_id=f"{session}:train:0", seq_id=1, **TTL_BODY).status_code == 404


def test_a_finished_session_takes_no_more_work_and_keeps_its_results(
    open_server: ServerProcess, served_model: Path, wire: Callable[..., Any]
) -> None:
    client = wire(open_server.url)
    session = client.session()
    model = client.model(session, str(served_model))
    saved = client.post("save_weights", model_id=model, seq_id=1, path="kept")
    path = client.result(saved)["path"]
    assert client.post(f"sessions/{session}/finish", reason={"type": "errored"}, detail="x").status_code == 200
    assert client.post(f"sessions/{session}/finish", reason={"type": "success"}).json()["status"] == "errored"
    assert client.post("session_heartbeat", session_id=session).status_code == 410
    late = client.post("optim_step", model_id=model, seq_id=2, **TTL_BODY)
    assert late.status_code == 400
    assert "was finished by its client (errored)" in late.json()["error"]
    assert client.result(saved)["path"] == path
    assert client.post("weights_info", tinker_path=path).status_code == 200


def test_sigterm_answers_the_polls_and_the_exit_code_is_0(
    start: Callable[..., ServerProcess], served_model: Path, wire: Callable[..., Any]
) -> None:
    server = start()
    client = wire(server.url)
    model = client.model(client.session(), str(served_model))
    blocked = client.post("save_weights", model_id=model, seq_id=2, path="b").json()["request_id"]
    answers: list[httpx.Response] = []
    poll = threading.Thread(target=lambda: answers.append(wire(server.url).post("retrieve_future", request_id=blocked)))
    poll.start()
    time.sleep(0.5)
    started = time.monotonic()
    assert server.stop(signal.SIGTERM) == 0
    poll.join(10)
    assert answers[0].status_code == 408
    assert time.monotonic() - started < 20
    assert "Traceback" not in server.log.read_text()


def test_after_kill_9_futures_are_answered_checkpoints_listed_and_polls_go_on(
    start: Callable[..., ServerProcess], served_model: Path, wire: Callable[..., Any]
) -> None:
    server = start()
    client = wire(server.url)
    session = client.session()
    model = client.model(session, str(served_model))
    done = client.post("save_weights", model_id=model, seq_id=1, path="a")
    path = client.result(done)["path"]
    waiting = client.post("save_weights", model_id=model, seq_id=3, path="c")
    server.kill()
    again = wire(start().url)
    assert again.result(done)["path"] == path
    assert [each["tinker_path"] for each in again.http.get("/api/v1/checkpoints").json()["checkpoints"]] == [path]
    assert again.post("session_heartbeat", session_id=session).status_code == 200
    again.post("save_weights", model_id=model, seq_id=2, path="b")
    assert again.result(waiting)["path"] == f"tinker://{model}/weights/c"


def test_a_second_server_on_the_store_is_refused(start: Callable[..., ServerProcess]) -> None:
    start()
    with pytest.raises(AssertionError, match="is in use by another server"):
        start()


def test_a_taken_port_is_refused() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match=r"cannot listen on .*choose another --port"):
            bind("127.0.0.1", taken.getsockname()[1], advice="choose another --port")


def test_an_idle_session_is_parked_and_comes_back(
    start: Callable[..., ServerProcess], served_model: Path, wire: Callable[..., Any]
) -> None:
    server = start("--session-timeout", "1", "--housekeeping-seconds", "0.3")
    client = wire(server.url)
    model = client.model(client.session(), str(served_model))
    client.result(client.post("save_weights", model_id=model, seq_id=1, path="a"))

    def state() -> str:
        return str(client.http.get("/status").json()["models"][0]["state"])

    assert state() == "loaded"
    deadline = time.monotonic() + 20
    while state() != "parked" and time.monotonic() < deadline:
        time.sleep(0.2)
    assert state() == "parked"
    back = client.post("save_weights", model_id=model, seq_id=2, path="b")
    assert client.result(back)["path"] == f"tinker://{model}/weights/b"
