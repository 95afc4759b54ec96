from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tinker import Datum, TensorData

from nat_plugin_evsys.calls import Call
from nat_plugin_evsys.rollouts.datum_logprobs import with_prompt_logprobs
from nat_plugin_evsys.rollouts.datums import (
    DatumSet,
    Provenance,
    chain_datum,
    group_datums,
    token_chains,
)
from nat_plugin_evsys.rollouts.trajectories import TrajectoryGroup

Make = Any


def inputs(datum: Any) -> dict[str, list[Any]]:
    return {name: tensor.tolist() for name, tensor in datum.loss_fn_inputs.items()}


def test_one_call_is_aligned_as_tinker_aligns_it(call: Make) -> None:
    datum, spans = chain_datum([call([10, 11, 12], [20, 21], logprobs=[-1.0, -2.0])], 0.5)
    assert datum.model_input.to_ints() == [10, 11, 12, 20]
    assert inputs(datum) == {
        "target_tokens": [11, 12, 20, 21],
        "logprobs": [0.0, 0.0, -1.0, -2.0],
        "advantages": [0.0, 0.0, 0.5, 0.5],
    }
    assert {name: tensor.dtype for name, tensor in datum.loss_fn_inputs.items()} == {
        "target_tokens": "int64",
        "logprobs": "float32",
        "advantages": "float32",
    }
    assert all(tensor.shape == [4] for tensor in datum.loss_fn_inputs.values())
    assert [(span.start, span.stop) for span in spans] == [(2, 4)]


def test_calls_that_extend_one_another_become_one_datum(call: Make) -> None:
    first = call([1, 2], [3, 4], logprobs=[-0.1, -0.2], policy_version=4)
    second = call([1, 2, 3, 4, 5], [6], logprobs=[-0.3], policy_version=5)
    result = group_datums(TrajectoryGroup("g", [1.0, 0.0], [[first, second], [call([1], [9])]]), advantage="group_mean")
    assert result.datums[0].model_input.to_ints() == [1, 2, 3, 4, 5]
    assert inputs(result.datums[0]) == {
        "target_tokens": [2, 3, 4, 5, 6],
        "logprobs": pytest.approx([0.0, -0.1, -0.2, 0.0, -0.3]),
        "advantages": [0.0, 0.5, 0.5, 0.0, 0.5],
    }
    origin = result.provenance[0]
    assert (origin.group, origin.trajectory, origin.sampled_tokens) == ("g", 0, 3)
    assert [(s.call_id, s.policy_version) for s in origin.spans] == [(first.call_id, 4), (second.call_id, 5)]
    assert (result.calls, result.trained_calls, len(result.datums), result.trained_trajectories) == (3, 3, 2, 2)


def test_a_rewritten_history_is_not_merged(call: Make) -> None:
    first = call([1, 2], [3, 4])
    stripped = call([1, 2, 4, 5], [6])  # the template dropped token 3, as reasoning-stripping templates do
    other_end = call([1, 2, 3, 5], [6])
    shorter = call([1, 2, 3], [6])
    calls = [first, stripped, other_end, shorter]
    assert token_chains(calls) == [[c] for c in calls]


def test_gspo_gets_its_mask_and_keeps_one_sequence_per_call(call: Make) -> None:
    first, second = call([1, 2], [3]), call([1, 2, 3, 4], [5])
    group = TrajectoryGroup("g", [1.0, 0.0], [[first, second], [call([1], [9])]])
    result = group_datums(group, advantage="group_mean", loss_fn="gspo")
    masks = [inputs(datum)["sequence_ratio_mask"] for datum in result.datums]
    assert masks == [[0.0, 1.0], [0.0, 0.0, 0.0, 1.0], [1.0]]
    others = group_datums(group, advantage="group_mean", loss_fn="ppo")
    assert "sequence_ratio_mask" not in others.datums[0].loss_fn_inputs
    assert len(others.datums) == 2


def test_dro_prompt_rows_take_the_learners_logprobs(call: Make) -> None:
    group = TrajectoryGroup("g", [1.0, 0.0], [[call([1, 2], [3, 4], logprobs=[-0.5, -0.75])], [call([1], [9])]])
    result = group_datums(group, advantage="group_mean", loss_fn="dro")
    learner = TensorData(data=[-3.0, -4.0, -5.0], dtype="float32", shape=[3])
    datum = with_prompt_logprobs(result.datums[0], result.provenance[0], learner)
    assert inputs(datum) == {
        "target_tokens": [2, 3, 4],
        "logprobs": [-3.0, -0.5, -0.75],
        "advantages": [0.0, 0.5, 0.5],
    }
    assert inputs(result.datums[0])["logprobs"] == [0.0, -0.5, -0.75]


def test_reasons_for_dropping(call: Make) -> None:
    good = call([1], [2])
    silent, promptless = call([1], []), call([], [2])
    broken = call([1], [2], logprobs=[float("-inf")])

    def dropped(rewards_G: list[float], calls_G: list[list[Call]], method: Any = "group_mean") -> DatumSet:
        return group_datums(TrajectoryGroup("g", rewards_G, calls_G), advantage=method)

    tied = dropped([0.3, 0.3], [[good, good], [good]])
    assert (tied.datums, tied.dropped) == ([], Counter(zero_variance_group=3))
    assert tied.dropped_trajectories == Counter(zero_variance_group=2)
    assert dropped([0.3, 0.3], [[good], [good]], "reward").trained_calls == 2
    alone = dropped([0.3], [[good]])
    assert (alone.dropped, alone.dropped_trajectories) == (
        Counter(single_trajectory_group=1),
        Counter(single_trajectory_group=1),
    )
    mixed = dropped([1.0, 0.0, 0.0], [[good, silent], [promptless, broken], []])
    assert mixed.dropped == Counter(empty_output=1, empty_prompt=1, non_finite_logprobs=1)
    assert mixed.dropped_trajectories == Counter(no_usable_calls=1, no_calls=1)
    assert mixed.trained_calls == 1
    with pytest.raises(ValueError, match="no Datums for loss_fn `cross_entropy`"):
        group_datums(TrajectoryGroup("g", [1.0], [[good]]), advantage="reward", loss_fn="cross_entropy")


def test_a_group_that_failed_is_trained_on_beside_the_batch(call: Make) -> None:
    batch = [0.0, 0.0, 1.0, 1.0]

    def beside(rewards_G: list[float], discount: float = 1.0) -> DatumSet:
        group = TrajectoryGroup("g", rewards_G, [[call([1], [number])] for number, _ in enumerate(rewards_G)])
        return group_datums(group, advantage="group_mean_std", discount=discount, batch=batch)

    for failed in (beside([0.0, 0.0]), beside([0.0, 0.0], discount=0.5)):
        assert [inputs(datum)["advantages"] for datum in failed.datums] == [[-1.0], [-1.0]]
        assert (failed.failed, failed.silent, failed.dropped) == (True, False, {})
    for rewards_G, reason in (([1.0, 1.0], "zero_variance_group"), ([0.0], "single_trajectory_group")):
        left_out = beside(rewards_G)
        assert (left_out.failed, left_out.silent, left_out.dropped) == (False, True, {reason: len(rewards_G)})
    assert inputs(beside([1.0, 0.0]).datums[0])["advantages"] == [1.0], "within a group that differs, as ever"


def test_a_trajectory_has_one_vote_however_many_calls_it_made(call: Make) -> None:
    talkative = [call([1], [2]) for _ in range(9)]
    group = TrajectoryGroup("g", [1.0, 0.0], [talkative, [call([1], [3])]])
    result = group_datums(group, advantage="group_mean")
    assert {inputs(datum)["advantages"][-1] for datum in result.datums} == {0.5, -0.5}


# Tokens of few values and short lengths, so that calls often extend one another by chance and branch on purpose.
IDS = st.lists(st.integers(0, 2), max_size=4)


@st.composite
def trajectories(draw: st.DrawFn) -> list[Call]:
    calls: list[Call] = []
    for number in range(draw(st.integers(0, 5))):
        parent = draw(st.sampled_from([None, *calls]))
        base = [] if parent is None else parent.prompt_ids + parent.output_ids
        output = draw(IDS)
        broken = draw(st.integers(0, 9)) == 0
        logprobs = [float("nan") if broken else draw(st.sampled_from([-0.5, -1.25, 0.0])) for _ in output]
        ids = [f"c{number}", 0, None, None, number, base + draw(IDS), output, logprobs]
        calls.append(Call(*ids, "stop", 1.0, 1.0, [], [], {}, number))
    return calls


GROUPS = st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), trajectories()), min_size=1, max_size=4)


@given(GROUPS, st.sampled_from(["group_mean", "group_mean_std", "maxrl", "reward"]), st.booleans())
def test_every_call_is_trained_once_with_its_recorded_ids_or_dropped_under_a_reason(
    rows: list[tuple[float, list[Call]]], method: Any, merge: bool
) -> None:
    group = TrajectoryGroup("g", [reward for reward, _ in rows], [calls for _, calls in rows])
    result = group_datums(group, advantage=method, merge_calls=merge)
    assert result.calls == sum(len(calls) for _, calls in rows)
    assert result.calls == result.trained_calls + sum(result.dropped.values())
    assert len(rows) == result.trained_trajectories + sum(result.dropped_trajectories.values())
    assert result.trained_trajectories == 0 or not result.dropped_trajectories["zero_variance_group"]

    trained = set()
    for datum, origin in zip(result.datums, result.provenance, strict=True):
        tokens = [*datum.model_input.to_ints(), inputs(datum)["target_tokens"][-1]]
        assert inputs(datum)["target_tokens"] == tokens[1:]
        marked = np.zeros(len(tokens) - 1, dtype=bool)
        for span in origin.spans:
            recorded = next(c for c in rows[origin.trajectory][1] if c.call_id == span.call_id)
            assert tokens[: span.stop + 1] == recorded.prompt_ids + recorded.output_ids
            assert inputs(datum)["logprobs"][span.start : span.stop] == recorded.logprobs
            assert not marked[span.start : span.stop].any()
            marked[span.start : span.stop] = True
            trained.add((origin.trajectory, span.call_id))
        assert all(np.asarray(inputs(datum)["logprobs"])[~marked] == 0.0)
        assert all(np.asarray(inputs(datum)["advantages"])[~marked] == 0.0)
    assert len(trained) == result.trained_calls


def trained_rows(datum: Datum, origin: Provenance) -> Iterator[tuple[tuple[int, ...], int, float, float]]:
    """``(context ids, target id, logprob, advantage)`` of every sampled token of a Datum."""
    ids = datum.model_input.to_ints()
    columns: list[list[Any]] = [datum.loss_fn_inputs[k].tolist() for k in ("target_tokens", "logprobs", "advantages")]
    for span in origin.spans:
        for row in range(span.start, span.stop):
            yield tuple(ids[: row + 1]), columns[0][row], columns[1][row], columns[2][row]


@given(GROUPS, st.sampled_from(["group_mean", "group_mean_std", "maxrl", "reward"]))
def test_merging_gives_the_same_multiset_of_trained_tokens(rows: list[tuple[float, list[Call]]], method: Any) -> None:
    group = TrajectoryGroup("g", [reward for reward, _ in rows], [calls for _, calls in rows])

    def multiset(merge: bool) -> Counter[Any]:
        result = group_datums(group, advantage=method, merge_calls=merge)
        pairs = zip(result.datums, result.provenance, strict=True)
        return Counter(row for datum, origin in pairs for row in trained_rows(datum, origin))

    assert multiset(True) == multiset(False)


def test_each_call_of_a_datum_has_its_own_advantage(call: Make) -> None:
    first, second = call([1, 2], [3]), call([1, 2, 3, 4], [5])
    group = TrajectoryGroup("g", [0.0, 0.0], [[first, second], [call([1], [9]), call([7], [8])]], [[0.0, 1.0], None])
    result = group_datums(group, advantage="group_mean", discount=0.5)
    assert inputs(result.datums[0])["advantages"] == [0.0, 0.25, 0.0, 0.5]
    plain = TrajectoryGroup("g", group.rewards_G, group.calls_G)
    assert group_datums(plain, advantage="group_mean", discount=0.5).dropped == {"zero_variance_group": 4}


def test_replies_that_were_cut_off_are_left_out_and_counted(call: Make) -> None:
    cut = call([1, 2], [3], stop_reason="length")
    group = TrajectoryGroup("g", [1.0, 0.0], [[cut, call([1, 2, 3, 4], [5])], [call([1], [9], stop_reason="length")]])
    result = group_datums(group, advantage="group_mean", mask_truncated=True)
    assert result.dropped == {"truncated": 2}
    assert result.reasons[cut.key] == "truncated"
    assert result.dropped_trajectories == {"no_usable_calls": 1}
    assert [inputs(datum)["advantages"] for datum in result.datums] == [[0.0, 0.0, 0.0, 0.5]]
    assert group_datums(group, advantage="group_mean").dropped == {}


def test_a_datum_has_the_temperature_of_each_of_its_calls(call: Make) -> None:
    calls = [call([1, 2], [3], temperature=0.5), call([1, 2, 3, 4], [5, 6])]
    datum, _ = chain_datum(calls, 1.0)
    assert inputs(datum)["temperature"] == [1.0, 0.5, 1.0, 1.0, 1.0]
    greedy, _ = chain_datum([call([1, 2], [3], temperature=0.0)], 1.0)
    assert "temperature" not in inputs(greedy), "the recorded logprobs of a greedy call are those of temperature 1"
