"""Streamed tokens reach their reader once each, also where a request is run again from its beginning."""

from __future__ import annotations

import numpy as np
import pytest
from tinker import types

from nat_plugin_evsys.engine.sampling.request import Limits, SampleRequest
from nat_plugin_evsys.engine.sampling.result import SampledSequence, SampleResult
from nat_plugin_evsys.errors import ReplicaError
from nat_plugin_evsys.replicas.orders import Delivery, SampleOrder, Tokens, with_seed

REPLY = [11, 12, 13, 14, 15]


def result(tokens: list[int]) -> SampleResult:
    logprobs = np.array([-float(token) for token in tokens], np.float32)
    sequence = SampledSequence("stop", "s-0", np.array(tokens, np.int32), logprobs)
    return SampleResult(sequences=[sequence], policy_version=3)


def piece(start: int, end: int) -> Tokens:
    return Tokens(0, start, REPLY[start:end], [-float(token) for token in REPLY[start:end]])


@pytest.mark.parametrize(
    "pieces",
    [
        pytest.param([piece(0, 1), piece(1, 2), piece(2, 5)], id="one run"),
        pytest.param([piece(0, 1), piece(1, 2), piece(0, 3), piece(3, 5)], id="again in larger pieces"),
        pytest.param([piece(0, 2), piece(3, 5)], id="again, with a gap that the result fills"),
        pytest.param([], id="all from the result"),
    ],
)
def test_every_token_is_handed_on_once(pieces: list[Tokens]) -> None:
    seen: list[tuple[int, float]] = []
    request = SampleRequest([1], 1, types.SamplingParams(), Limits(100, 50, frozenset()), None)
    delivery = Delivery(request, lambda _, ids, logprobs: seen.extend(zip(ids, logprobs, strict=True)))
    for each in pieces:
        delivery.take(each)
    delivery.finish(result(REPLY))
    assert seen == [(token, -float(token)) for token in REPLY]


def test_another_reply_than_was_handed_on_is_refused() -> None:
    request = SampleRequest([1], 1, types.SamplingParams(), Limits(100, 50, frozenset()), None)
    delivery = Delivery(request, lambda *_: None)
    delivery.take(piece(0, 2))
    with pytest.raises(ReplicaError, match="other tokens"):
        delivery.finish(result([11, 40, 13]))


def test_an_order_has_a_seed_and_no_callbacks() -> None:
    params = with_seed(types.SamplingParams(max_tokens=4))
    assert params.seed is not None
    assert with_seed(params).seed == params.seed
    order = SampleOrder.of([1, 2], 3, params, {"topk_sample": 2, "on_tokens": print, "constraint": None})
    assert (order.options, order.grammar, order.streamed) == ({"topk_sample": 2}, None, True)
