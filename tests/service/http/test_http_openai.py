"""OpenAI's endpoint over base models, checkpoints and named policies; downloads of weights."""

from __future__ import annotations

import io
import json
import signal
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from serve_process import ALICE, BOB, ServerProcess

from nat_plugin_evsys.service.proto import tinker_wire_pb2 as wire_pb2

ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 6, "temperature": 0.0}


def step(client: Any, model: str, seq: int) -> None:
    """A forward_backward that teaches three tokens, and an optimizer step."""
    import numpy as np

    message = wire_pb2.ForwardBackwardRequest(model_id=model, seq_id=seq, loss_fn="cross_entropy")
    datum = message.data.add()
    datum.model_input.add().encoded_text.tokens = np.array([65, 66, 67], dtype=np.int32).tobytes()
    target = datum.loss_fn_inputs["target_tokens"]
    target.dense, target.dtype = np.array([66, 67, 68], dtype=np.int64).tobytes(), wire_pb2.DTYPE_INT64
    target.shape.append(3)
    sent = client.http.post(
        "/api/v1/forward_backward",
        content=message.SerializeToString(),
        headers={"content-type": "application/x-protobuf"},
    )
    assert sent.status_code == 200, sent.text
    poll = client.post("retrieve_future", request_id=sent.json()["request_id"])
    assert poll.headers["content-type"] == "application/x-protobuf", poll.text
    assert len(wire_pb2.ForwardBackwardOutput.FromString(poll.content).loss_fn_outputs) == 1
    client.result(client.post("optim_step", model_id=model, seq_id=seq + 1, adam_params={"learning_rate": 0.05}))


def test_every_error_under_v1_is_openais_object(keyed_server: ServerProcess) -> None:
    auth = {"authorization": f"Bearer {ALICE}"}
    for prefix in ("/v1", "/oai/api/v1"):
        asked = [
            (404, httpx.post(f"{keyed_server.url}{prefix}/embeddings", json={}, headers=auth)),
            (405, httpx.get(f"{keyed_server.url}{prefix}/chat/completions", headers=auth)),
            (401, httpx.post(f"{keyed_server.url}{prefix}/chat/completions", json={})),
            (400, httpx.post(f"{keyed_server.url}{prefix}/chat/completions", content=b"{", headers=auth)),
            (413, httpx.post(f"{keyed_server.url}{prefix}/chat/completions", content=b" " * (9 << 20), headers=auth)),
        ]
        for status, answered in asked:
            assert answered.status_code == status, answered.text
            assert answered.json()["error"].keys() == {"message", "type", "param", "code"}


@pytest.fixture(scope="module")
def trained(keyed_server: ServerProcess, served_model: Path) -> dict[str, str]:
    """Alice's sampler, training and external checkpoints of one trained model, by kind."""
    from wire_client import Wire

    client = Wire(keyed_server.url, ALICE)
    model = client.model(client.session(), str(served_model))
    step(client, model, 1)
    saves = {"save_weights_for_sampler": "s", "save_weights": "w", "save_weights_external": "e"}
    paths = {
        name: str(client.result(client.post(kind, model_id=model, seq_id=3 + index, path=name))["path"])
        for index, (kind, name) in enumerate(saves.items())
    }
    return {**paths, "model": model}


def chat(server: ServerProcess, key: str, place: str = "/v1") -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + place, api_key=key, max_retries=0)


def test_the_owner_chats_with_base_model_path_and_run(
    keyed_server: ServerProcess, served_model: Path, trained: dict[str, str]
) -> None:
    client = chat(keyed_server, ALICE)
    replies = {}
    for name in (str(served_model), trained["s"], trained["model"]):
        reply = client.chat.completions.create(model=name, logprobs=True, extra_body={"return_token_ids": True}, **ASK)
        assert reply.choices[0].logprobs is not None
        ids = (reply.choices[0].model_extra or {})["token_ids"]
        assert reply.usage is not None
        assert len(ids) == len(reply.choices[0].logprobs.content or []) == reply.usage.completion_tokens
        replies[name] = [token.logprob for token in reply.choices[0].logprobs.content or []]
    assert replies[trained["s"]] == pytest.approx(replies[trained["model"]], abs=1e-5)
    assert replies[trained["s"]] != pytest.approx(replies[str(served_model)], abs=1e-3)
    names = [model.id for model in client.models.list()]
    assert str(served_model) in names
    assert trained["s"] in names
    assert client.models.retrieve(str(served_model)).id == str(served_model)


def test_the_next_prompt_starts_with_the_ids_of_the_reply(keyed_server: ServerProcess, served_model: Path) -> None:
    asked: list[Any] = [{"role": "user", "content": "hi"}]
    model = {"model": str(served_model)}
    place, auth = f"{keyed_server.url}/v1/tokenize", {"authorization": f"Bearer {ALICE}"}
    lead = httpx.post(place, json={**model, "prompt": "é"}, headers=auth).json()["tokens"][0]

    def ask(key: str, messages: list[Any]) -> dict[str, Any]:
        # Half a character, which no text brings back.
        options: Any = {"logit_bias": {str(lead): 100}, "max_tokens": 4, "extra_body": {"return_token_ids": True}}
        return chat(keyed_server, key).chat.completions.create(messages=messages, **model, **options).model_dump()

    first = ask(ALICE, asked)
    (choice,) = first["choices"]
    known = first["prompt_token_ids"] + choice["token_ids"]
    assert choice["token_ids"] == [lead] * 4
    reply = {"role": "assistant", "content": choice["message"]["content"]}
    turns = [*asked, reply, {"role": "user", "content": "and?"}]
    assert ask(ALICE, turns)["prompt_token_ids"][: len(known)] == known
    assert ask(BOB, turns)["prompt_token_ids"][: len(known)] != known, "another key's client starts anew"


def test_a_stream_has_the_same_text_at_tinkers_own_place(keyed_server: ServerProcess, trained: dict[str, str]) -> None:
    whole = chat(keyed_server, ALICE).chat.completions.create(model=trained["s"], **ASK).choices[0].message.content
    stream = chat(keyed_server, ALICE, "/oai/api/v1").chat.completions.create(model=trained["s"], stream=True, **ASK)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole


@pytest.mark.parametrize("name", ["nobody", "tinker://x/sampler_weights/y", "tinker://", "../..", "", "a" * 5000])
def test_a_model_that_is_not_served_is_openais_404(keyed_server: ServerProcess, name: str) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        chat(keyed_server, ALICE).chat.completions.create(model=name, **ASK)
    assert caught.value.code == "model_not_found"


def test_anothers_checkpoint_is_not_served(keyed_server: ServerProcess, trained: dict[str, str]) -> None:
    for name in (trained["s"], trained["model"]):
        with pytest.raises(openai.NotFoundError):
            chat(keyed_server, BOB).chat.completions.create(model=name, **ASK)
    with pytest.raises(openai.AuthenticationError):
        chat(keyed_server, "tml-unknown-0123456789").chat.completions.create(model=trained["s"], **ASK)


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"model": 3}', b'{"a":' * 100_000])
def test_malformed_bodies_are_openais_400(keyed_server: ServerProcess, body: bytes) -> None:
    answer = httpx.post(
        f"{keyed_server.url}/v1/chat/completions", content=body, headers={"authorization": f"Bearer {ALICE}"}
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_named_policy_is_served_to_every_key(
    start: Callable[..., ServerProcess], served_model: Path, wire: Callable[..., Any]
) -> None:
    keys = {"EVSYS_API_KEYS": f"{ALICE},{BOB}"}
    server = start(env=keys)
    client = wire(server.url, ALICE)
    model = client.model(client.session(), str(served_model))
    path = client.result(client.post("save_weights_for_sampler", model_id=model, seq_id=1, path="s"))["path"]
    assert server.stop(signal.SIGINT) == 0
    server = start("--policy", f"helpdesk={path}", env=keys)
    bob = chat(server, BOB)
    assert "helpdesk" in [each.id for each in bob.models.list()]
    assert bob.chat.completions.create(model="helpdesk", **ASK).usage is not None
    with pytest.raises(openai.NotFoundError):
        bob.chat.completions.create(model=path, **ASK)


def test_external_weights_are_fetched_by_signed_urls_without_a_key(
    keyed_server: ServerProcess, trained: dict[str, str], wire: Callable[..., Any]
) -> None:
    client = wire(keyed_server.url, ALICE)
    place = f"/api/v1/training_runs/{trained['model']}/checkpoints/external_weights/e"
    urls = client.http.get(f"{place}/external_weights_urls").json()["urls"]
    assert set(urls) == {"adapter_config.json", "adapter_model.safetensors"}
    config = httpx.get(urls["adapter_config.json"])
    assert json.loads(config.content)["r"] == 2
    url = urls["adapter_model.safetensors"]
    assert len(httpx.get(url).content) > 1000
    assert httpx.get(url[:-1] + ("0" if url[-1] != "0" else "1")).status_code == 403
    assert httpx.get(url.replace("adapter_model.safetensors", "manifest.json")).status_code == 403
    assert httpx.get(url.partition("?")[0], headers={"x-api-key": ALICE}).status_code == 403
    refused = client.http.get(place.replace("external_weights/e", "weights/w") + "/external_weights_urls")
    assert refused.status_code == 400
    assert wire(keyed_server.url, BOB).http.get(f"{place}/external_weights_urls").status_code == 404


def test_an_older_sdk_gets_an_archive(
    keyed_server: ServerProcess, trained: dict[str, str], wire: Callable[..., Any]
) -> None:
    client = wire(keyed_server.url, ALICE)
    answer = client.http.get(f"/api/v1/training_runs/{trained['model']}/checkpoints/sampler_weights/s/archive")
    assert answer.status_code == 302
    assert answer.headers["expires"].endswith("GMT")
    with tarfile.open(fileobj=io.BytesIO(httpx.get(answer.headers["location"]).content)) as archive:
        assert set(archive.getnames()) == {"adapter_config.json", "adapter_model.safetensors"}
        file = archive.extractfile("adapter_config.json")
        assert file is not None
        assert json.loads(file.read())["r"] == 2
