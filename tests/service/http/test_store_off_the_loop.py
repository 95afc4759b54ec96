"""SQLite is never used on the event loop: a slow disk must hold up nobody but who waits for it."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import event
from starlette.applications import Starlette
from starlette.routing import BaseRoute, Route, compile_path
from wire_client import Wire

from nat_plugin_evsys.config.serve import ServeConfig
from nat_plugin_evsys.service.http.app import create_app
from nat_plugin_evsys.service.http.context import ServiceContext
from nat_plugin_evsys.service.http.housekeeping import Housekeeping
from nat_plugin_evsys.service.http.running import running
from nat_plugin_evsys.service.http.unoffered_routes import unoffered_routes
from nat_plugin_evsys.service.proto import tinker_wire_pb2
from nat_plugin_evsys.web.listen import bind, listen, url_of


class WatchedServer:
    """A server in a thread of this process; every SQL statement is noted, by whether it ran on an event loop."""

    def __init__(self, config: ServeConfig) -> None:
        self.on_loop: list[str] = []
        self.off_loop: Counter[str] = Counter()
        self._config = config
        self._listener = bind("127.0.0.1", 0, advice="")
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self.url = url_of("127.0.0.1", self._listener.getsockname()[1])

    def __enter__(self) -> WatchedServer:
        self._thread.start()
        assert self._started.wait(120)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop()
        self._thread.join(60)

    async def _serve(self) -> None:
        async with running(self._config, asyncio.Event()) as context:
            self.context: ServiceContext = context
            for engine in (context.store._reader, context.store._engine):
                event.listen(engine, "before_cursor_execute", self._note)
            self.app = create_app(context)
            self._loop = asyncio.get_running_loop()
            self._server = listen(self.app, self._listener, self._started.set)
            await self._server.run()

    def _note(self, _connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if asyncio._get_running_loop() is None:
            self.off_loop[statement.split()[0]] += 1
        else:
            self.on_loop.append(statement)

    def on_the_loop(self, function: Any) -> None:
        """Call it on the server's event loop."""

        async def call() -> None:
            function()

        asyncio.run_coroutine_threadsafe(call(), self._loop).result(10)

    def routes(self) -> set[tuple[str, str]]:
        """Method and path of every route but those that only say what is not offered."""
        starlette = self.app._app  # type: ignore[attr-defined]
        assert isinstance(starlette, Starlette)
        return _pairs(starlette.routes) - _pairs(unoffered_routes(self.context))


def _pairs(routes: Sequence[BaseRoute]) -> set[tuple[str, str]]:
    return {
        (method, route.path)
        for route in routes
        if isinstance(route, Route)
        for method in route.methods or ()
        if method != "HEAD"
    }


@pytest.fixture(scope="module")
def server(served_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WatchedServer]:
    config = ServeConfig(
        base_models=[str(served_model)],
        store=tmp_path_factory.mktemp("watched") / "store",
        device="cpu",
        poll_seconds=0.2,
        session_ttl=1e6,
    )
    with WatchedServer(config) as started:
        yield started


def test_no_route_uses_sqlite_on_the_event_loop(server: WatchedServer, served_model: Path) -> None:
    asked: set[tuple[str, str]] = set()
    client = Wire(server.url)
    client.http.event_hooks["request"] = [lambda request: asked.add((request.method, request.url.path))]
    use_every_route(client, str(served_model))
    Housekeeping(server.context).once(0.0)

    unasked = {
        (method, path)
        for method, path in server.routes()
        if not any(method == used and compile_path(path)[0].match(url) for used, url in asked)
    }
    assert unasked == set()
    assert server.on_loop == []
    assert server.off_loop["SELECT"] > 50
    assert server.off_loop["INSERT"] > 10


def test_a_read_on_the_event_loop_would_be_seen(server: WatchedServer) -> None:
    server.on_the_loop(lambda: server.context.store.session("x"))
    assert [statement.split()[0] for statement in server.on_loop] == ["SELECT"]
    server.on_loop.clear()


def use_every_route(client: Wire, base_model: str) -> None:
    """A client's life that asks for everything that the server has."""
    get, api = client.http.get, "/api/v1"
    for path in ("/healthz", f"{api}/healthz", "/metrics", "/status", f"{api}/get_server_capabilities"):
        assert get(path).status_code == 200
    assert "start it with --ray" in client.http.post("/replicas", json={"replicas": 2}).json()["error"]
    for path in ("client/config", "client/dynamic_config", "telemetry"):
        assert client.post(path).status_code == 200
    session = client.session()
    model = client.model(session, base_model)
    assert client.post("session_heartbeat", session_id=session).status_code == 200
    assert client.post("get_info", model_id=model).status_code == 200
    _train(client, model)
    saves = ("save_weights", "save_weights_for_sampler", "save_weights_external")
    paths = [
        client.result(client.post(kind, model_id=model, seq_id=3 + number, path="a"))["path"]
        for number, kind in enumerate(saves)
    ]
    client.result(client.post("load_weights", model_id=model, seq_id=6, path=paths[0], optimizer=True))
    client.result(client.post("load_weights", session_id=session, model_seq_id=1, path=paths[0], optimizer=True))
    assert client.post("weights_info", tinker_path=paths[0]).status_code == 200
    sampler = _sample(client, session, paths[1])
    for path in ("sessions", f"sessions/{session}", f"samplers/{sampler}", "training_runs", f"training_runs/{model}"):
        assert get(f"{api}/{path}").status_code == 200, path
    for path in (f"training_runs/{model}/checkpoints", "checkpoints"):
        assert get(f"{api}/{path}").status_code == 200, path
    for prefix in ("/v1", "/oai/api/v1"):
        assert get(f"{prefix}/models").status_code == 200
        assert get(f"{prefix}/models/{base_model}").status_code == 200
        chat = {"model": paths[1], "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
        assert client.http.post(f"{prefix}/chat/completions", json=chat).status_code == 200
        for route, asked in (
            ("completions", {"prompt": "hi", "max_tokens": 2}),
            ("responses", {"input": "hi", "max_output_tokens": 16}),
            ("tokenize", {"prompt": "hi"}),
        ):
            answer = client.http.post(f"{prefix}/{route}", json={"model": paths[1], **asked})
            assert answer.status_code == 200, answer.text
    for prefix in ("", "/oai/api"):
        for route, asked in (("inference/v1/generate", {"token_ids": [72]}), ("tokenize", {"prompt": "hi"})):
            answer = client.http.post(f"{prefix}/{route}", json={"model": paths[1], **asked})
            assert answer.status_code == 200, answer.text
    _dispose(client, f"{api}/training_runs/{model}/checkpoints")
    assert client.post(f"sessions/{session}/finish").status_code == 200


def _train(client: Wire, model: str) -> None:
    message = tinker_wire_pb2.ForwardBackwardRequest(model_id=model, seq_id=1, loss_fn="cross_entropy")
    datum = message.data.add()
    datum.model_input.add().encoded_text.tokens = np.array([65, 66], dtype=np.int32).tobytes()
    target = datum.loss_fn_inputs["target_tokens"]
    target.dense, target.dtype = np.array([66, 67], dtype=np.int64).tobytes(), tinker_wire_pb2.DTYPE_INT64
    body, kind = message.SerializeToString(), {"content-type": "application/x-protobuf"}
    sent = client.http.post("/api/v1/forward_backward", content=body, headers=kind)
    while client.post("retrieve_future", request_id=sent.json()["request_id"]).status_code == 408:
        pass
    client.result(client.post("optim_step", model_id=model, seq_id=2, adam_params={"learning_rate": 0.05}))


def _sample(client: Wire, session: str, path: str) -> str:
    made = client.post("create_sampling_session", session_id=session, sampling_session_seq_id=9, model_path=path)
    sampler = str(made.json()["sampling_session_id"])
    assert client.post("join_sampling_session", sampling_session_id=sampler).status_code == 200
    prompt = {"chunks": [{"type": "encoded_text", "tokens": [65]}]}
    sent = client.post(
        "asample", sampling_session_id=sampler, seq_id=1, prompt=prompt, sampling_params={"max_tokens": 2}
    ).json()
    assert client.post("cancel_future", request_id=sent["request_id"]).status_code == 200
    return sampler


def _dispose(client: Wire, checkpoints: str) -> None:
    external, weights = f"{checkpoints}/external_weights/a", f"{checkpoints}/weights/a"
    for url in client.http.get(f"{external}/external_weights_urls").json()["urls"].values():
        assert client.http.get(url).status_code == 200
    assert client.http.get(f"{external}/archive").status_code == 302
    assert client.http.put(f"{weights}/ttl", json={"ttl_seconds": 3600}).status_code == 200
    assert client.http.post(f"{weights}/publish").status_code == 200
    assert client.http.delete(f"{weights}/publish").status_code == 200
    assert client.http.delete(weights).status_code == 200
