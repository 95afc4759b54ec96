"""What the SDK raises becomes this package's errors, in the service's own words, and waiting never lacks words."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import tinker
from pydantic import ValidationError
from tinker.types import RequestErrorCategory

from nat_plugin_evsys.backends.remote import waiting as service_waiting
from nat_plugin_evsys.backends.remote.errors import Purpose, readable
from nat_plugin_evsys.backends.remote.service import TinkerService
from nat_plugin_evsys.backends.remote.waiting import ServiceWatch
from nat_plugin_evsys.config import EvsysPolicyConfig
from nat_plugin_evsys.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    NonFiniteGradientError,
    PromptTooLongError,
    ServiceCheckpointError,
    ServiceDataError,
    ServiceError,
    ServiceGradientError,
    ServiceLostError,
    ServiceUnavailableError,
)
from nat_plugin_evsys.policy.weights import check_place
from nat_plugin_evsys.training.job import describe_error

URL = "http://127.0.0.1:9"


def mapped(error: BaseException, purpose: Purpose = "data") -> BaseException:
    return readable(error, what="forward_backward", purpose=purpose, where=URL, key_from="$TINKER_API_KEY")


def failed(words: str, category: RequestErrorCategory = RequestErrorCategory.User) -> tinker.RequestFailedError:
    """As ``tinker.lib.api_future_impl`` raises it."""
    text = f"Request failed: {words} for self.request_id='r1' and expected type self.model_cls=<class 'X'>"
    return tinker.RequestFailedError(text, request_id="r1", category=category)


def status(code: int, body: Any) -> tinker.APIStatusError:
    response = httpx.Response(code, request=httpx.Request("POST", f"{URL}/api/v1/optim_step"), json=body)
    classes = {401: tinker.AuthenticationError, 404: tinker.NotFoundError, 400: tinker.BadRequestError}
    return classes.get(code, tinker.APIStatusError)(f"Error code: {code} - {body}", response=response, body=body)


@pytest.mark.parametrize(
    ("purpose", "kind", "base"),
    [
        ("data", ServiceDataError, DataError),
        ("checkpoint", ServiceCheckpointError, CheckpointError),
        ("save", ServiceCheckpointError, CheckpointError),
        ("sample", ServiceError, ServiceError),
        ("start", ServiceError, ServiceError),
    ],
)
def test_a_refusal_keeps_the_words_and_the_category(purpose: Purpose, kind: type, base: type) -> None:
    error = mapped(failed("data[3]: target_tokens for 2 of 7 positions"), purpose)
    assert type(error) is kind
    assert isinstance(error, base)
    assert isinstance(error, ServiceError)
    assert error.category == "user"
    assert error.request_id == "r1"
    assert str(error).startswith("forward_backward: data[3]: target_tokens for 2 of 7 positions")
    assert URL in str(error)
    assert "self.request_id" not in str(error)


def test_a_failure_of_the_server_is_no_data_error() -> None:
    error = mapped(failed("CUDA out of memory", RequestErrorCategory.Server))
    assert type(error) is ServiceError
    assert error.category == "server"


def test_a_gradient_that_is_not_finite() -> None:
    error = mapped(failed("the gradient is not finite; the step was refused"), "step")
    assert isinstance(error, ServiceGradientError)
    assert isinstance(error, NonFiniteGradientError)
    assert type(mapped(failed("learning_rate must be positive"), "step")) is ServiceError


def test_a_prompt_that_is_too_long_is_the_same_error_as_in_process() -> None:
    error = mapped(failed(str(PromptTooLongError(90, 20, 100))), "sample")
    assert isinstance(error, PromptTooLongError)
    assert (error.prompt_tokens, error.max_tokens, error.context_length) == (90, 20, 100)


def test_statuses() -> None:
    refused = mapped(status(401, {"error": "unknown key"}))
    assert isinstance(refused, ConfigError)
    assert "$TINKER_API_KEY: unknown key" in str(refused)
    lost = mapped(status(404, {"detail": "no model s:train:0"}), "step")
    assert isinstance(lost, ServiceLostError)
    assert "no model s:train:0" in str(lost)
    assert "resume: true" in str(lost)
    gone = mapped(status(404, {"error": {"message": "no checkpoint tinker://a/weights/b"}}), "checkpoint")
    assert isinstance(gone, ServiceCheckpointError)
    assert "no checkpoint tinker://a/weights/b; set `checkpoint:`" in str(gone)
    assert isinstance(mapped(status(400, {"error": "rank 0"})), ServiceDataError)
    assert mapped(status(503, {"error": "loading"})).category == "server"  # type: ignore[attr-defined]


def test_a_lost_result_and_a_lost_connection() -> None:
    text = "Error retrieving result: Error code: 404 - no such future with status 404 for self.request_id='r1'"
    assert isinstance(mapped(ValueError(text), "checkpoint"), ServiceLostError)
    unreachable = mapped(tinker.APIConnectionError(request=httpx.Request("GET", URL)))
    assert isinstance(unreachable, ServiceUnavailableError)
    assert "start it again on the same store" in str(unreachable)


def test_what_is_not_of_the_service_stays_as_it_is() -> None:
    own = ZeroDivisionError("in the user's loss")
    assert mapped(own) is own
    named = DataError("the custom loss is inf or NaN")
    assert mapped(named) is named


async def test_a_job_shows_the_services_words_once_and_a_users_error_with_its_cause() -> None:
    watch = ServiceWatch(TinkerService(URL, "tml-x"))
    refused: Future[None] = Future()
    refused.set_exception(failed("data[3]: no target_tokens"))
    with pytest.raises(ServiceDataError) as caught:
        await watch.wait(refused, "forward_backward", "data")
    assert describe_error(caught.value).count("no target_tokens") == 1
    own: Future[None] = Future()
    error = KeyError("weights")
    error.__cause__ = ValueError("the first cause")
    own.set_exception(error)
    with pytest.raises(KeyError) as raised:
        await watch.wait(own, "forward_backward_custom", "data")
    assert "the first cause" in describe_error(raised.value)


async def test_a_result_ends_an_outage() -> None:
    """The next one begins anew; its seconds are not counted from the first."""
    watch = ServiceWatch(TinkerService("http://127.0.0.1:9", "tml-x"))
    watch._tell("connection refused", 0.0)
    assert watch._down_since is not None
    done: Future[int] = Future()
    done.set_result(1)
    assert await watch.wait(done, "a sample", "sample") == 1
    assert watch._down_since is None


# -- settings ---------------------------------------------------------------------------------------------------------


def config(**settings: Any) -> EvsysPolicyConfig:
    return EvsysPolicyConfig(base_model="builtin/tiny", **settings)


@pytest.mark.parametrize(
    "setting",
    [{"lora_alpha": 16}, {"device": "cpu"}, {"dtype": "float32"}, {"max_batch_size": 8}, {"trust_remote_code": True}],
)
def test_settings_that_cannot_reach_a_service_are_refused_by_name(setting: dict[str, Any]) -> None:
    assert config(**setting).base_url is None
    with pytest.raises(ValidationError, match=f"no effect over a service.*{next(iter(setting))}"):
        config(base_url=URL, **setting)


def test_a_checkpoint_of_a_service_has_its_layers() -> None:
    assert config(base_url=URL, train_mlp=False).train_mlp is False
    with pytest.raises(ValidationError, match=r"no effect over a service.*train_mlp \(the checkpoint has its layers\)"):
        config(base_url=URL, train_mlp=False, checkpoint="tinker://run/weights/one")


@pytest.mark.parametrize("setting", [{"tokenizer": "x"}, {"api_key_env": "KEY"}])
def test_settings_of_a_service_alone(setting: dict[str, Any]) -> None:
    assert config(base_url=URL, **setting).base_url == URL
    with pytest.raises(ValidationError, match=f"{next(iter(setting))}: set without base_url"):
        config(**setting)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://a", "http://", "http://me:secret@host:1"])
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(ValidationError, match="base_url"):
        config(base_url=url)


def test_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TINKER_API_KEY", raising=False)
    assert TinkerService.of(config(base_url="http://localhost:1/")).key.startswith("tml-")
    assert TinkerService.of(config(base_url="http://[::1]:1")).key.startswith("tml-")
    with pytest.raises(ConfigError, match="needs a key: type `export TINKER_API_KEY=tml-…`"):
        TinkerService.of(config(base_url="http://10.0.0.1:1"))
    monkeypatch.setenv("BOX_KEY", "tml-box")
    service = TinkerService.of(config(base_url="http://10.0.0.1:1", api_key_env="BOX_KEY"))
    assert service.key == "tml-box"
    monkeypatch.setenv("BOX_KEY", "box")
    with pytest.raises(ConfigError, match=r"\$BOX_KEY holds no Tinker key") as caught:
        TinkerService.of(config(base_url="http://10.0.0.1:1", api_key_env="BOX_KEY"))
    assert "box;" not in str(caught.value)


def test_a_checkpoint_lies_where_the_policy_trains() -> None:
    check_place("tinker://run/weights/x", URL)
    check_place(Path("runs/x"), None)
    with pytest.raises(ConfigError, match="set the policy's base_url"):
        check_place("tinker://run/weights/x", None)
    with pytest.raises(ConfigError, match="cannot read it; remove base_url"):
        check_place(Path("runs/x"), URL)


# -- looking and waiting ----------------------------------------------------------------------------------------------


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture
def web_page() -> Iterator[str]:
    """The URL of a server that is no Tinker service."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(404)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        do_POST = do_GET

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Page)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_service_that_is_not_there(closed_port: int) -> None:
    with pytest.raises(ServiceUnavailableError, match=r"does not answer \(ConnectError.*start `nat evsys serve` there"):
        TinkerService(f"http://127.0.0.1:{closed_port}", "tml-x").check("builtin/tiny")


def test_a_server_that_is_no_tinker_service(web_page: str) -> None:
    with pytest.raises(ConfigError, match="is not a Tinker service"):
        TinkerService(web_page, "tml-x").check("builtin/tiny")


async def test_waiting_says_what_for_and_ends(
    closed_port: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(service_waiting, "REPORT_SECONDS", 0.1)
    monkeypatch.setattr(service_waiting, "OUTAGE_SECONDS", 0.5)
    watch = ServiceWatch(TinkerService(f"http://127.0.0.1:{closed_port}", "tml-x"))
    pending: list[Future[None]] = [Future() for _ in range(3)]
    with caplog.at_level(logging.INFO):
        waits = [watch.wait(future, "optim_step", "step") for future in pending]
        errors = await asyncio.wait_for(asyncio.gather(*waits, return_exceptions=True), 20)
    assert all(isinstance(error, ServiceUnavailableError) for error in errors)
    lines = [record.getMessage() for record in caplog.records if "does not answer" in record.getMessage()]
    assert "waiting for 3 x optim_step" in lines[0]
    # one line for all who wait, not one each
    assert len(lines) <= 10
    assert not any(future.cancelled() for future in pending)


async def test_a_service_that_comes_back_is_waited_for(
    web_page: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(service_waiting, "REPORT_SECONDS", 0.1)
    monkeypatch.setattr(service_waiting, "OUTAGE_SECONDS", 0.3)
    future: Future[str] = Future()
    asyncio.get_running_loop().call_later(1.0, future.set_result, "done")
    with caplog.at_level(logging.INFO):
        assert await ServiceWatch(TinkerService(web_page, "tml-x")).wait(future, "sample", "sample") == "done"
    assert "waiting for 1 x sample" in caplog.text
    assert f"the service at {web_page} answers" in caplog.text


@pytest.mark.parametrize("cancel", [True, False])
async def test_cancelling_takes_back_a_sample_but_never_an_operation_on_a_model(web_page: str, cancel: bool) -> None:
    future: Future[None] = Future()
    watch = ServiceWatch(TinkerService(web_page, "tml-x"))
    waiting = asyncio.ensure_future(watch.wait(future, "sample", "sample", cancel=cancel))
    await asyncio.sleep(0.05)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await asyncio.sleep(0.05)
    assert future.cancelled() is cancel
