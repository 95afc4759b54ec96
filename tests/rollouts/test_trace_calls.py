"""The tokens of recorded calls: what was recorded of them is what is trained on."""

from __future__ import annotations

from typing import Any

import pytest

from nat_plugin_evsys.calls import DropReason
from nat_plugin_evsys.rollouts.traces.record import Record, TracedCall
from nat_plugin_evsys.rollouts.traces.to_calls import CallReader

END, SAMPLED = 99, [500, ord("b"), 99]


class LetterRenderer:
    """A token a letter, and the end of the turn."""

    def render(self, messages: Any, tools: Any) -> list[int]:
        return [token for message in messages for token in self.render_reply(message)]

    def render_reply(self, message: Any) -> list[int]:
        return [*map(ord, message["content"]), END]


def reader_of(*, retokenize: bool = False, needs_logprobs: bool = False) -> CallReader:
    return CallReader(LetterRenderer(), retokenize, 1.0, frozenset({"own"}), needs_logprobs=needs_logprobs)


def record(**fields: Any) -> Record:
    """A record of one reply, "ab"."""
    messages = [{"role": "user", "content": "q"}]
    return Record("it", calls=[TracedCall(messages=messages, reply={"role": "assistant", "content": "ab"}, **fields)])


@pytest.mark.parametrize("retokenize", [False, True])
@pytest.mark.parametrize("model", ["", "own"])
@pytest.mark.parametrize("logprobs", [[], [-1.0]])
def test_recorded_tokens_are_taken_without_logprobs_too(retokenize: bool, model: str, logprobs: list[float]) -> None:
    reader = reader_of(retokenize=retokenize)
    [call], reason, _ = reader.calls(record(token_ids=SAMPLED, logprobs=logprobs, model=model), "run")
    assert (call.output_ids, call.stop_reason, reason) == (SAMPLED, "stop", None)
    assert (call.logprobs, call.logprobs_unknown, call.retokenized) == ([0.0] * 3, True, False)
    assert (reader.drift.compared, reader.drift.drifted) == (1, 1)


def test_with_logprobs_they_are_exact() -> None:
    [call], _, _ = reader_of(needs_logprobs=True).calls(record(token_ids=SAMPLED, logprobs=[-1.0, -2.0, -3.0]), "run")
    assert (call.output_ids, call.logprobs) == (SAMPLED, [-1.0, -2.0, -3.0])
    assert not call.logprobs_unknown


def test_logprobs_that_fit_the_text_go_before_tokens_that_do_not_fit_them() -> None:
    """A server may record the end of the turn among the tokens and not among the logprobs."""
    traced = record(token_ids=[ord("a"), ord("b"), END], logprobs=[-1.0, -2.0])
    [call], _, _ = reader_of(needs_logprobs=True).calls(traced, "run")
    assert (call.output_ids, call.logprobs, call.logprobs_unknown) == ([ord("a"), ord("b")], [-1.0, -2.0], False)


def test_importance_weights_need_logprobs() -> None:
    calls, reason, error = reader_of(needs_logprobs=True).calls(record(token_ids=SAMPLED), "run")
    assert (calls, reason) == ([], DropReason.NOT_RENDERED)
    assert "call 0: 3 tokens and 0 logprobs, by which algorithm `rl` weighs replies" in str(error)


def test_the_tokens_of_another_model_may_mean_others() -> None:
    foreign = record(token_ids=SAMPLED, model="another")
    assert reader_of().calls(foreign, "run")[1] is DropReason.TEXT_ONLY
    reader = reader_of(retokenize=True)
    [call], _, _ = reader.calls(foreign, "run")
    assert (call.output_ids, call.retokenized, reader.drift.compared) == ([ord("a"), ord("b"), END], True, 0)
