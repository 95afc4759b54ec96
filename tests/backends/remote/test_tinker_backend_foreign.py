"""What other services answer differently from `nat evsys serve`, as SkyRL's does."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from tinker import types

from nat_plugin_evsys.backends.remote.errors import readable
from nat_plugin_evsys.backends.remote.service import TinkerService
from nat_plugin_evsys.backends.remote.session import TinkerSession, add_missing_loss, sampler_uri
from nat_plugin_evsys.backends.remote.waiting import ServiceWatch


@pytest.mark.parametrize("path", ["tinker://run/epoch-0001", "tinker://run/sampler_weights/epoch-0001"])
def test_both_forms_of_a_sampler_path_name_one_checkpoint(path: str) -> None:
    assert sampler_uri(path) == "tinker://run/sampler_weights/epoch-0001"


def test_loss_that_is_left_out_is_the_sum_over_the_tokens() -> None:
    losses = [types.TensorData.from_torch(torch.tensor(each)) for each in ([0.5, -1.25], [3.0])]
    output = types.ForwardBackwardOutput("scalar", [{"elementwise_loss": each} for each in losses], {})

    add_missing_loss(output)

    assert output.metrics == {"loss:sum": 2.25}


def test_loss_that_is_given_is_kept() -> None:
    loss = types.TensorData.from_torch(torch.tensor([0.5]))
    output = types.ForwardBackwardOutput("scalar", [{"elementwise_loss": loss}], {"loss:sum": 7.0})

    add_missing_loss(output)

    assert output.metrics == {"loss:sum": 7.0}


def test_a_service_of_an_older_protocol_is_named() -> None:
    error = readable(
        AssertionError("asample promises always carry sample_sequence_ids"),
        what="sample",
        purpose="data",
        where="http://gpu-box:8000",
        key_from="TINKER_API_KEY",
    )

    assert "older protocol" in str(error)
    assert "tinker==0.24.1" in str(error)


async def test_a_session_of_an_sdk_that_cannot_finish_one_is_left_to_expire(caplog: pytest.LogCaptureFixture) -> None:
    client: Any = object()
    session = TinkerSession(ServiceWatch(TinkerService("http://gpu-box:8000", "tml-x")), client, "m", {})

    with caplog.at_level(logging.INFO):
        await session.close()

    assert session.closed
    assert caplog.text == ""
