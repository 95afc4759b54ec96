"""Episodes that others built: texts with logprobs become calls, or are refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from nat.data_models.finetuning import EpisodeItem, Trajectory
from openai.types.chat.chat_completion import ChoiceLogprobs

from nat_plugin_evsys.calls import Call, DropReason
from nat_plugin_evsys.rollouts.plain_episodes import is_plain, recorded_rows, with_calls
from nat_plugin_evsys.rollouts.trajectories import build_trajectory, calls_of, group_of

END = 99
OPEN = {"system": 1, "user": 2, "assistant": 3, "tool": 4}


class LetterRenderer:
    """A role's token, a token a letter, the end of the turn; a prompt ends with the assistant's role."""

    def render(self, messages: Any, tools: Any) -> list[int]:
        assert not tools
        return [*(token for m in messages for token in (OPEN[m["role"]], *map(ord, m["content"]), END)), 3]

    def render_reply(self, message: Any) -> list[int]:
        return [*map(ord, message["content"]), END]


def entry(token: str, logprob: float) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": None, "top_logprobs": []}


def trajectory(logprobs: Any, content: str = "ab", **metadata: Any) -> Trajectory:
    question = EpisodeItem(role="user", content="q")
    reply = EpisodeItem(role="assistant", content=content, logprobs=logprobs, metadata=metadata or None)
    return Trajectory(episode=[question, reply], reward=1.0, metadata={"row_id": "r"})


def the_call(plain: Trajectory) -> Call:
    assert is_plain(plain)
    (call,) = calls_of(with_calls(plain, "t", LetterRenderer()))
    return call


OPENAI = ChoiceLogprobs.model_validate({"content": [entry("a", -0.5), entry("b", -0.25)], "refusal": None})


@pytest.mark.parametrize(
    "logprobs",
    [[-0.5, -0.25], OPENAI, OPENAI.content, {"content": [entry("a", -0.5), entry("b", -0.25)]}],
    ids=["numbers", "openai", "entries", "dict"],
)
def test_every_form_of_logprobs(logprobs: Any) -> None:
    call = the_call(trajectory(logprobs))
    assert call.prompt_ids == [2, ord("q"), END, 3]
    assert (call.output_ids, call.logprobs) == ([ord("a"), ord("b")], [-0.5, -0.25])
    assert (call.stop_reason, call.temperature, call.policy_version) == ("length", 1.0, 0)


def test_the_end_of_the_turn_may_be_among_them() -> None:
    call = the_call(trajectory([-0.5, -0.25, -0.1]))
    assert (call.output_ids, call.stop_reason) == ([ord("a"), ord("b"), END], "stop")


def test_who_sampled_it_is_in_the_metadata() -> None:
    """``recompute_logprobs`` trains on calls of the present version only."""
    call = the_call(trajectory([-0.5, -0.25], temperature=0.7, policy_version=3))
    assert (call.temperature, call.policy_version) == (0.7, 3)


def test_named_tokens_are_taken_as_they_are() -> None:
    """Whatever their text is: a sampler may spell a text in other tokens than the tokenizer does."""
    call = the_call(trajectory([entry("token_id:500", -1.0), entry(f"token_id:{END}", -2.0)]))
    assert (call.output_ids, call.logprobs, call.stop_reason) == ([500, END], [-1.0, -2.0], "stop")


def test_each_sampled_item_is_a_call_and_the_rest_is_context() -> None:
    episode = [
        EpisodeItem(role="system", content="s"),
        EpisodeItem(role="user", content="q"),
        EpisodeItem(role="assistant", content="x", logprobs=[]),
        EpisodeItem(role="tool", content="7", metadata={"tool_call_id": "c"}),
        EpisodeItem(role="assistant", content="y", logprobs=[-1.0]),
        EpisodeItem(role="environment", content="go"),
        EpisodeItem(role="assistant", content="z", logprobs=[-2.0]),
    ]
    recorded = with_calls(Trajectory(episode=episode, reward=0.5), "t", LetterRenderer())
    first, second = calls_of(recorded)
    assert [message["role"] for message in first.messages] == ["system", "user", "assistant", "tool"]
    assert [message["role"] for message in second.messages][-2:] == ["assistant", "user"]
    assert second.prompt_ids[: len(first.prompt_ids)] == first.prompt_ids
    assert [first.sequence, second.sequence] == [0, 1]
    assert group_of([recorded], 0).rewards_G == [0.5]


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        (trajectory([-0.5] * 5), r"t, item 1: 5 logprobs for a text of 2 tokens and the end of the turn"),
        (trajectory([-0.5]), "t, item 1: 1 logprobs for a text of 2 tokens"),
        (trajectory(["high", "low"]), "t, item 1: logprobs are numbers"),
        (trajectory([{"token": "a"}, {"token": "b"}]), "t, item 1: logprobs are numbers"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(plain: Trajectory, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_calls(plain, "t", LetterRenderer())


def test_recorded_and_textual_trajectories_are_not_plain(call: Any) -> None:
    assert not is_plain(build_trajectory([call([1], [2])], 0.0, {}))
    assert not is_plain(trajectory([]))


def test_retokenize_takes_the_tokens_of_the_text_where_no_others_are_known() -> None:
    """And says how often text leads back to the tokens that were sampled, where those are known."""
    text, misfit = trajectory([]), trajectory([-0.5] * 5)
    named = trajectory([entry(f"token_id:{ord('a')}", -1.0), entry(f"token_id:{ord('b')}", -2.0)])
    drifted = trajectory([entry("token_id:500", -1.0), entry(f"token_id:{END}", -2.0)])
    recorded = recorded_rows([[text, misfit], [named, drifted]], LetterRenderer(), retokenize=True)
    calls = [calls_of(each)[0] for row in recorded.rows for each in row]
    assert [call.retokenized for call in calls] == [True, True, False, False]
    assert calls[0].output_ids == calls[1].output_ids == [ord("a"), ord("b"), END]
    assert (recorded.drift.compared, recorded.drift.drifted, recorded.left_out) == (2, 1, {})


def test_text_alone_is_left_out_under_its_reason_or_refused_with_what_to_type() -> None:
    recorded = recorded_rows([[trajectory([]), trajectory([-0.5, -0.25])]], LetterRenderer(), retokenize=False)
    assert [len(row) for row in recorded.rows] == [1]
    assert recorded.left_out == {DropReason.TEXT_ONLY: 1}
    nothing_else = recorded_rows([[trajectory([])]], LetterRenderer(), retokenize=False)
    with pytest.raises(ValueError, match="set the adapter's retokenize: true"):
        group_of(nothing_else.rows[0], 0)
