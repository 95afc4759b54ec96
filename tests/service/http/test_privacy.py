"""What a server keeps to itself: its files, its paths, its clients' keys, and where it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from raw_http import answer, connect, send
from serve_process import ALICE, ServerProcess
from wire_client import Wire

from nat_plugin_evsys.service.http.logs import without_keys


def external(client: Wire, base_model: str, name: str) -> str:
    """The place of a checkpoint that is to be downloaded."""
    model = client.model(client.session(), base_model)
    saved = client.result(client.post("save_weights_external", model_id=model, seq_id=1, path=name))
    assert saved["path"].endswith(f"/external_weights/{name}")
    return f"/api/v1/training_runs/{model}/checkpoints/external_weights/{name}"


def test_nobody_else_can_read_the_store(
    keyed_server: ServerProcess, served_model: Path, wire: Callable[..., Wire]
) -> None:
    external(wire(keyed_server.url, ALICE), str(served_model), "mine")
    store = keyed_server.log.with_suffix("")
    paths = [store, *store.rglob("*")]
    assert {"service.sqlite", "adapter_model.safetensors", "run.json"} <= {path.name for path in paths}
    open_ones = {str(path): oct(path.stat().st_mode) for path in paths if path.stat().st_mode & 0o077}
    assert open_ones == {}


def test_a_key_file_that_others_can_read_is_named(keyed_server: ServerProcess) -> None:
    keys = keyed_server.log.with_name("keys")
    assert f"other users of this machine can read the keys; type: chmod go= {keys}" in keyed_server.log.read_text()


def test_the_url_of_a_deleted_checkpoint_shows_no_path(
    keyed_server: ServerProcess, served_model: Path, wire: Callable[..., Wire]
) -> None:
    client = wire(keyed_server.url, ALICE)
    place = external(client, str(served_model), "gone")
    urls = list(client.http.get(f"{place}/external_weights_urls").json()["urls"].values())
    urls.append(client.http.get(f"{place}/archive").headers["location"])
    assert [httpx.get(url).status_code for url in urls] == [200] * len(urls)
    assert client.http.delete(place).status_code == 200
    for url in urls:
        refused = httpx.get(url)
        assert refused.status_code == 404
        assert "does not exist" in refused.json()["error"]
        assert str(keyed_server.log.parent) not in refused.text


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1:1", "x@evil.example"])
def test_redirects_and_urls_do_not_follow_a_forged_host(
    keyed_server: ServerProcess, served_model: Path, wire: Callable[..., Wire], host: str
) -> None:
    client = wire(keyed_server.url, ALICE)
    place = external(client, str(served_model), "here")
    forged = {"host": host, "x-forwarded-host": host, "x-forwarded-proto": "https", "forwarded": f"host={host}"}
    answered = client.http.get(f"{place}/archive", headers=forged)
    urls = client.http.get(f"{place}/external_weights_urls", headers=forged).json()["urls"]
    for url in (answered.headers["location"], *urls.values()):
        assert url.startswith(f"{keyed_server.url}/api/v1/downloads/")
        assert httpx.get(url).status_code == 200


def test_urls_are_those_of_the_proxy_where_one_is_named(
    start: Callable[..., ServerProcess], served_model: Path, wire: Callable[..., Wire]
) -> None:
    client = wire(start("--public-url", "https://tinker.example.org/evsys/").url)
    place = external(client, str(served_model), "a")
    location = client.http.get(f"{place}/archive").headers["location"]
    assert location.startswith("https://tinker.example.org/evsys/api/v1/downloads/")


def test_a_key_in_a_path_is_not_logged(keyed_server: ServerProcess) -> None:
    secret = "tml-put-into-the-path-0123"
    paths = [f"/api/v1/{secret}/create_session", f"/{secret}", f"/api/v1/sessions/{secret}", f"/v1/models/a%2F{secret}"]
    paths += [f"/v1/sk-{secret}", f"/x/{secret.replace('-', '%2d')}", f"/x/{secret.replace('t', '%2574', 1)}"]
    for path in paths:
        with connect(keyed_server.url) as connection:
            send(connection, f"GET {path} HTTP/1.1\r\nHost: x\r\nX-Request-Id: {secret}\r\n".encode())
            send(connection, f"X-API-Key: {ALICE}\r\nConnection: close\r\n\r\n".encode())
            assert answer(connection).split(b" ")[1] in (b"404", b"405", b"200")
    text = keyed_server.log.read_text()
    lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    assert sum("…" in line.get("path", "") for line in lines) >= len(paths)
    assert "put-into-the-path" not in text


def test_what_is_no_key_is_logged_as_it_is() -> None:
    for path in ("/api/v1/create_session", "/api/v1/sessions/0f-tm-l", "/v1/models/Qwen/Qwen3-0.6B"):
        assert without_keys(path) == path
