"""Who is let in, and what each may see."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from nat_process import run_nat
from serve_process import ALICE, BOB, ServerProcess

from nat_plugin_evsys.config.serve import ServeConfig, is_loopback
from nat_plugin_evsys.errors import Refusal
from nat_plugin_evsys.service.http.auth import LOCAL, Keys, owner_of

PROTECTED = [
    ("POST", "/api/v1/create_session"),
    ("POST", "/api/v1/forward_backward"),
    ("POST", "/api/v1/retrieve_future"),
    ("GET", "/api/v1/checkpoints"),
    ("GET", "/metrics"),
    ("GET", "/status"),
    ("POST", "/replicas"),
    ("GET", "/v1/models"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/api/v1/copy_weights"),
]


@pytest.mark.parametrize(("method", "path"), PROTECTED)
@pytest.mark.parametrize("key", [None, "tml-wrong-0123456789", ALICE[:-1], ALICE + "x", "tml-\xff0123456789abcdef"])
def test_without_a_known_key_everything_but_healthz_is_401(
    keyed_server: ServerProcess, method: str, path: str, key: str | None
) -> None:
    headers: dict[str, Any] = {} if key is None else {"x-api-key": key.encode("latin-1")}
    answer = httpx.request(method, keyed_server.url + path, headers=headers)
    assert answer.status_code == 401
    assert "API key" in answer.text


def test_healthz_needs_no_key(keyed_server: ServerProcess) -> None:
    for path in ("/healthz", "/api/v1/healthz"):
        assert httpx.get(keyed_server.url + path).json() == {"status": "ok"}


def test_a_key_is_taken_as_x_api_key_or_bearer_from_file_and_environment(keyed_server: ServerProcess) -> None:
    for key in (ALICE, BOB):
        for headers in ({"x-api-key": key}, {"authorization": f"Bearer {key}"}, {"authorization": f"bearer {key}"}):
            assert httpx.get(f"{keyed_server.url}/api/v1/sessions", headers=headers).status_code == 200


def test_only_the_operator_may_change_the_server(keyed_server: ServerProcess) -> None:
    answer = httpx.post(f"{keyed_server.url}/replicas", headers={"x-api-key": ALICE}, json={"replicas": 2})
    assert answer.status_code == 403
    assert "EVSYS_OPERATOR_KEY" in answer.text
    operator = "tml-operator-0123456789"
    keys = Keys([ALICE], operator)
    keys.check_operator(keys.owner({"x-api-key": operator}))
    Keys([]).check_operator(Keys([]).owner({}))  # without keys, whoever is on this machine
    Keys([], operator).check_operator(owner_of(operator))
    for with_keys, owner in ((keys, owner_of(ALICE)), (Keys([ALICE]), owner_of(ALICE)), (Keys([], operator), LOCAL)):
        with pytest.raises(Refusal, match="only the operator") as caught:
            with_keys.check_operator(owner)
        assert caught.value.status == 403


def test_what_is_anothers_answers_like_what_is_not_there(
    keyed_server: ServerProcess, served_model: Path, wire: Callable[..., Any]
) -> None:
    alice, bob = wire(keyed_server.url, ALICE), wire(keyed_server.url, BOB)
    session = alice.session()
    model = alice.model(session, str(served_model))
    saved = alice.post("save_weights", model_id=model, seq_id=1, path="mine")
    path = alice.result(saved)["path"]
    sampler = alice.post("create_sampling_session", session_id=session, sampling_session_seq_id=5, model_path=path)
    sampler_id = sampler.json()["sampling_session_id"]
    request_id = saved.json()["request_id"]

    def asks(session: str, model: str, request_id: str, sampler: str, path: str) -> list[httpx.Response]:
        run = f"/api/v1/training_runs/{model}"
        sample = {"seq_id": 1, "prompt": {"chunks": [{"type": "encoded_text", "tokens": [65]}]}, "sampling_params": {}}
        chat = {"model": path, "messages": [{"role": "user", "content": "hi"}]}
        return [
            bob.post("session_heartbeat", session_id=session),
            bob.post(f"sessions/{session}/finish"),
            bob.http.get(f"/api/v1/sessions/{session}"),
            bob.post("create_model", session_id=session, model_seq_id=0, base_model="x"),
            bob.post("get_info", model_id=model),
            bob.post("optim_step", model_id=model, seq_id=2, adam_params={}),
            bob.post("retrieve_future", request_id=request_id),
            bob.post("cancel_future", request_id=request_id),
            bob.post("asample", sampling_session_id=sampler, **sample),
            bob.http.get(f"/api/v1/samplers/{sampler}"),
            bob.http.get(run),
            bob.http.get(f"{run}/checkpoints"),
            bob.http.delete(f"{run}/checkpoints/weights/mine"),
            bob.http.post(f"{run}/checkpoints/weights/mine/publish"),
            bob.http.put(f"{run}/checkpoints/weights/mine/ttl", json={"ttl_seconds": 3600}),
            bob.post("weights_info", tinker_path=path),
            bob.http.post("/v1/chat/completions", json=chat),
        ]

    theirs = (session, model, request_id, sampler_id, path)
    other_session = str(uuid.uuid4())
    moved = [text.replace(session, other_session) for text in (model, sampler_id, path)]
    nothing = (other_session, moved[0], uuid.uuid4().hex, moved[1], moved[2])
    for there, missing in zip(asks(*theirs), asks(*nothing), strict=True):
        assert there.status_code == missing.status_code == 404, (there.request.url, there.text, missing.text)
        said, expected = there.text, missing.text
        for name, other in zip(theirs, nothing, strict=True):
            said, expected = said.replace(name, "ID"), expected.replace(other, "ID")
        assert said == expected
    assert session not in bob.http.get("/api/v1/sessions").json()["sessions"]
    assert bob.http.get("/api/v1/checkpoints").json()["checkpoints"] == []
    assert path not in bob.http.get("/v1/models").text
    assert alice.http.get("/api/v1/training_runs").json()["training_runs"][0]["training_run_id"] == model


def test_a_published_checkpoint_is_read_by_all_and_disposed_of_by_its_owner(
    keyed_server: ServerProcess, served_model: Path, wire: Callable[..., Any]
) -> None:
    alice, bob = wire(keyed_server.url, ALICE), wire(keyed_server.url, BOB)
    model = alice.model(alice.session(), str(served_model))
    path = alice.result(alice.post("save_weights", model_id=model, seq_id=1, path="open"))["path"]
    place = f"/api/v1/training_runs/{model}/checkpoints/weights/open"
    assert bob.post("weights_info", tinker_path=path).status_code == 404
    assert alice.http.post(f"{place}/publish").status_code == 200
    assert bob.post("weights_info", tinker_path=path).json()["lora_rank"] == 2
    session = bob.session()
    loaded = bob.post("load_weights", session_id=session, model_seq_id=0, path=path, optimizer=True)
    assert bob.result(loaded)["model_id"] == f"{session}:train:0"
    assert bob.http.delete(place).status_code == bob.http.delete(f"{place}/publish").status_code == 404
    assert alice.http.delete(f"{place}/publish").status_code == 200
    assert bob.post("weights_info", tinker_path=path).status_code == 404


def test_no_key_is_ever_printed_or_logged(keyed_server: ServerProcess) -> None:
    httpx.get(
        f"{keyed_server.url}/api/v1/sessions", headers={"x-api-key": "tml-sneaky-0123456789"}, params={"k": ALICE}
    )
    text = keyed_server.log.read_text() + keyed_server.out.read_text()
    assert "/api/v1/sessions" in text
    for secret in (ALICE, BOB, "tml-sneaky"):
        assert secret not in text
    owners = {json.loads(line).get("owner") for line in keyed_server.log.read_text().splitlines() if line[:1] == "{"}
    assert owner_of(ALICE) in owners


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--host", "0.0.0.0"], "there is no API key"),
        (["--api-key", "sk-0123456789abcdef"], "must start with `tml-`"),
        (["--api-key", "tml-short"], "at least 16"),
        (["--policy", "name"], "NAME=tinker://"),
    ],
)
def test_a_server_that_would_stand_open_does_not_start(options: list[str], said: str) -> None:
    done = run_nat("evsys", "serve", "--base-model", "builtin/tiny", *options, timeout=60)
    assert done.code == 1
    assert said in done.err
    assert "Traceback" not in done.err
    assert not {"tml-short", "sk-0123456789abcdef"} & set(done.err.split())


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        *((host, True) for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost")),
        *((host, False) for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", "localhost.example.org")),
    ],
)
def test_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


FOREIGN_ORIGINS = [
    "null",
    "",
    "https://evil.example",
    "http://127.0.0.1.evil.example",
    "http://127.0.0.1@evil.example",
    "http://[::1",
    "chrome-extension://abcdef",
    "file://",
]


def test_without_keys_a_web_page_of_another_host_is_kept_out() -> None:
    keys = Keys([])
    assert keys.owner({"host": "127.0.0.1:8000"}) == LOCAL
    assert keys.owner({"host": "localhost:8000", "origin": "http://localhost:3000"}) == LOCAL
    for site in ("same-origin", "same-site", "none"):
        assert keys.owner({"host": "[::1]:8000", "origin": "http://[::1]:3000", "sec-fetch-site": site}) == LOCAL
    for headers in (
        {"host": "evil.example:8000"},
        {"host": "127.0.0.1:8000", "origin": "https://evil.example"},
        {"host": "127.0.0.1.evil.example"},
        {"host": "[::1"},
        *({"host": "127.0.0.1:8000", "origin": origin} for origin in FOREIGN_ORIGINS),
        {"host": "127.0.0.1:8000", "sec-fetch-site": "cross-site"},
        {"host": "127.0.0.1:8000", "origin": "http://localhost:3000", "sec-fetch-site": "Cross-Site"},
    ):
        with pytest.raises(Refusal, match=r"not this machine|cross-site") as caught:
            keys.owner(headers)
        assert caught.value.status == 403


def test_settings_do_not_show_keys() -> None:
    config = ServeConfig(base_models=["builtin/tiny"], api_keys=[ALICE])  # type: ignore[list-item]
    assert ALICE not in repr(config) + config.model_dump_json()
