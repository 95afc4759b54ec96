from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nat.data_models.finetuning import Trajectory, TrajectoryCollection

from nat_plugin_evsys.calls import Call
from nat_plugin_evsys.rollouts.episodes import message_chains
from nat_plugin_evsys.rollouts.roles import validate_episode_order
from nat_plugin_evsys.rollouts.trajectories import build_trajectory, calls_of, group_of

Make = Any


def view(trajectory: Trajectory) -> list[tuple[str, str]]:
    return [(item.role.value, item.content) for item in trajectory.episode]


def msg(role: str, content: Any = "", **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


def tool_call(arguments: str) -> list[dict[str, Any]]:
    return [{"id": "c1", "type": "function", "function": {"name": "add", "arguments": arguments}}]


def test_agent_with_a_tool_is_one_conversation(call: Make) -> None:
    opening = [msg("system", "be brief"), msg("user", "1+1?")]
    first = call([1, 2], [3], messages=opening, reply=msg("assistant", None, tool_calls=tool_call('{"a": 1}')))
    # As a client sends it back: content "" instead of None, arguments spaced differently, a field added.
    echoed = msg("assistant", "", tool_calls=tool_call('{"a":1}'), refusal=None)
    answer = msg("tool", "2", tool_call_id="c1")
    second = call([1, 2, 3, 4], [5, 6], messages=[*opening, echoed, answer], reply=msg("assistant", "two"))
    trajectory = build_trajectory([second, first], 1.0, {"row_id": "q"})

    assert view(trajectory) == [
        ("system", "be brief"),
        ("user", "1+1?"),
        ("assistant", ""),
        ("tool", "2"),
        ("assistant", "two"),
    ]
    asked, observed, final = trajectory.episode[2:]
    assert asked.logprobs == first.logprobs
    assert asked.metadata is not None
    assert asked.metadata["tool_calls"][0]["function"]["name"] == "add"
    assert observed.metadata == {"tool_call_id": "c1"}
    assert final.logprobs == second.logprobs
    validate_episode_order(trajectory, "t")


def test_history_without_logprobs_gets_an_empty_list(call: Make) -> None:
    few_shot = [msg("user", "2+2?"), msg("assistant", "4"), msg("user", "3+3?")]
    trajectory = build_trajectory([call([1], [2], messages=few_shot)], 0.0, {})
    assert [item.logprobs for item in trajectory.episode] == [None, [], None, [-0.25]]


def test_independent_calls_follow_one_another(call: Make) -> None:
    planner = call([1], [2], messages=[msg("system", "plan"), msg("user", "x")], reply=msg("assistant", "p"))
    solver = call([3], [4], messages=[msg("system", "solve"), msg("user", "p")], reply=msg("assistant", "s"))
    assert view(build_trajectory([planner, solver], 0.0, {})) == [
        ("system", "plan"),
        ("user", "x"),
        ("assistant", "p"),
        ("system", "solve"),
        ("user", "p"),
        ("assistant", "s"),
    ]


def test_retry_and_parallel_calls_open_chains_of_their_own(call: Make) -> None:
    prompt = [msg("user", "x")]
    a = call([1], [2], messages=prompt, reply=msg("assistant", "a"))
    b = call([1], [3], messages=prompt, reply=msg("assistant", "a"))
    more = [*prompt, msg("assistant", "a"), msg("user", "y")]
    c = call([1, 2, 4], [5], messages=more)
    d = call([1, 3, 4], [6], messages=more)
    assert message_chains([a, b, c, d]) == [[a, c], [b, d]]
    validate_episode_order(build_trajectory([a, b, c, d], 0.0, {}), "t")


def test_neighbours_of_one_role_are_joined_for_reading_only(call: Make) -> None:
    messages = [msg("user", "one"), msg("user", [{"type": "text", "text": "two"}, {"type": "image_url"}])]
    one = call([7, 8], [9], messages=messages, reply=msg("assistant", "a"))
    two = call([7], [9, 9], messages=[msg("assistant", "prefilled")], reply=msg("assistant", "b"))
    trajectory = build_trajectory([one, two], 0.0, {})
    assert view(trajectory) == [("user", "one\ntwo<image_url>"), ("assistant", "a\nprefilled\nb")]
    assert trajectory.episode[1].logprobs == one.logprobs + two.logprobs
    assert trajectory.episode[1].metadata == {"call_ids": [one.call_id, two.call_id], "policy_version": 0}
    assert calls_of(trajectory) == [one, two]


ANY_MESSAGES = st.lists(
    st.builds(
        msg,
        st.sampled_from(["system", "developer", "user", "assistant", "tool", "function", "critic"]),
        st.sampled_from([None, "", "a", "b"]),
    ),
    max_size=5,
)


@given(st.lists(ANY_MESSAGES, min_size=1, max_size=4), st.data())
def test_every_view_obeys_the_role_rules_and_the_calls_survive_nat(prompts: list[Any], data: st.DataObject) -> None:
    calls = [
        Call("id", 0, None, None, 3, [1], [2, 3], [-0.5, -1e-9], "stop", 1.0, 1.0, prompt, [], msg("assistant", "a"), n)
        for n, prompt in enumerate(prompts)
    ]
    trajectory = build_trajectory(calls, 0.5, {"row_id": 1})
    validate_episode_order(trajectory, "t")
    wire = TrajectoryCollection(trajectories=[[trajectory]], run_id="r").model_dump_json()
    back = TrajectoryCollection.model_validate_json(wire).trajectories[0][0]
    assert calls_of(back) == calls
    assert group_of([back], 0).calls_G == [calls]


def test_order_of_arrival_decides(call: Make) -> None:
    early, late = call([1], [2]), call([1], [3])
    assert calls_of(build_trajectory([late, early], 0.0, {})) == [early, late]


def test_what_cannot_be_a_trajectory_is_refused(call: Make) -> None:
    with pytest.raises(ValueError, match="at least one recorded call"):
        build_trajectory([], 0.0, {})
    with pytest.raises(ValueError, match="`calls` is reserved"):
        build_trajectory([call([1], [2])], 0.0, {"calls": []})


def test_malformed_calls_are_refused_by_name(call: Make) -> None:
    def trajectory(**fields: Any) -> Trajectory:
        good = build_trajectory([call([1], [2])], 0.0, {})
        assert good.metadata is not None
        good.metadata["calls"][0] |= fields
        return good

    foreign = Trajectory(episode=trajectory().episode, reward=0.0)
    cases = [
        (foreign, r"t: no recorded calls in metadata\['calls'\]"),
        (trajectory(surprise=1), "t, call 0: not a recorded call"),
        (trajectory(logprobs=[]), "1 output_ids, 0 logprobs"),
        (trajectory(prompt_ids=[1, -1]), "prompt_ids holds -1"),
        (trajectory(output_ids=["2"]), "output_ids holds '2'"),
        (trajectory(output_ids=[True]), "output_ids holds True"),
    ]
    for bad, text in cases:
        with pytest.raises(ValueError, match=text):
            calls_of(bad, "t")


def test_group_names_the_bad_trajectory(call: Make) -> None:
    good = build_trajectory([call([1], [2])], 1.0, {"row_id": "q9"})
    bad = good.model_copy(update={"reward": float("nan")})
    with pytest.raises(ValueError, match=r"trajectory 1 of group 4 \(row q9\): reward nan is not finite"):
        group_of([good, bad], 4)
    bad = good.model_copy(update={"episode": good.episode[:1]})
    with pytest.raises(ValueError, match=r"trajectory 0 of group 4 \(row q9\), item 0, role `user`: the last item"):
        group_of([bad], 4)
