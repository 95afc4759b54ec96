"""A step's sequences are shared out by the distinct tokens of their prefix tree."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from random_datums import related_sequences

from nat_plugin_evsys.engine.tree.trie import TokenTrie
from nat_plugin_evsys.replicas.shares import Shares, share_out


def of(sequences: list[list[int]], replicas: int) -> Shares:
    return share_out([np.array(sequence) for sequence in sequences], replicas)


def size(sequences: list[list[int]]) -> int:
    return len(TokenTrie.build([np.array(sequence) for sequence in sequences]))


def groups(count: int, attempts: int, prompt: int, reply: int) -> list[list[int]]:
    rng = random.Random(count)
    prompts = [[rng.randrange(1000) for _ in range(prompt)] for _ in range(count)]
    return [[1, 2, 3, *p, *(rng.randrange(1000) for _ in range(reply))] for p in prompts for _ in range(attempts)]


@pytest.mark.parametrize("replicas", [1, 2, 3])
@pytest.mark.parametrize("seed", range(20))
def test_the_plan_is_as_good_as_the_best_of_all_cuts(seed: int, replicas: int) -> None:
    sequences = related_sequences(random.Random(seed), 9, 24)
    plan = of(sequences, replicas)
    assert sorted(itertools.chain(*plan.members)) == list(range(len(sequences)))
    assert plan.tokens == [size([sequences[i] for i in members]) if members else 0 for members in plan.members]
    assert plan.distinct == size(sequences)

    ordered = sorted(sequences, key=lambda s: np.array(s, ">u4").tobytes())
    cuts = [
        [size(ordered[a:b]) if a < b else 0 for a, b in itertools.pairwise([0, *places, len(ordered)])]
        for places in itertools.combinations_with_replacement(range(len(ordered) + 1), replicas - 1)
    ]
    least = min(max(sizes) for sizes in cuts)
    assert max(plan.tokens) <= 1.05 * least
    assert sum(plan.tokens) == min(sum(sizes) for sizes in cuts if max(sizes) <= int(1.05 * least))


def test_groups_stay_together_where_the_work_is_balanced_without_a_cut() -> None:
    plan = of(groups(8, 4, prompt=50, reply=20), 2)
    owners = [{i // 4 for i in members} for members in plan.members]
    assert not owners[0] & owners[1]
    assert plan.metrics() == {
        "replicas:max": 2.0,
        "replica_imbalance:max": 1.0,
        "replica_repeated_tokens:sum": 3.0,  # what all prompts begin with
    }


def test_a_group_is_cut_where_a_replica_would_idle_otherwise() -> None:
    plan = of(groups(1, 8, prompt=50, reply=100), 2)
    assert [len(members) for members in plan.members] == [4, 4]
    assert plan.metrics()["replica_repeated_tokens:sum"] == 53


def test_fewer_sequences_than_replicas_leave_some_without_work() -> None:
    plan = of(groups(2, 1, prompt=5, reply=5), 4)
    assert [len(members) for members in plan.members] == [1, 1, 0, 0]
    assert plan.tokens[2:] == [0, 0]
