"""Requests go to the replica that holds their prefix, unless it is much busier than another."""

from __future__ import annotations

from nat_plugin_evsys.replicas.routing import BLOCK, TOGETHER, PrefixRoutes

PROMPT = list(range(3 * BLOCK))
OTHER = list(range(500, 500 + 3 * BLOCK))


def test_the_holder_of_the_longest_prefix_is_chosen() -> None:
    routes = PrefixRoutes()
    assert routes.choose("v1", PROMPT[:BLOCK], [0, 0]) == 0
    assert routes.choose("v1", PROMPT, [1, 0]) == 0
    assert routes.choose("v1", OTHER, [1, 0]) == 1
    assert routes.choose("v1", [*OTHER, *range(BLOCK)], [0, 1]) == 1
    assert routes.choose("v1", PROMPT, [1, 0]) == 0


def test_without_a_prefix_the_least_loaded_one_is() -> None:
    assert PrefixRoutes().choose("v1", PROMPT, [3, 2, 1, 1]) == 2
    assert PrefixRoutes().choose("v1", [1, 2], [1, 0]) == 1


def test_a_busy_holder_is_passed_over_and_then_both_hold_it() -> None:
    routes = PrefixRoutes()
    loads = [0, 0]
    for _ in range(64):
        loads[routes.choose("v1", PROMPT, loads)] += 1
    assert abs(loads[0] - loads[1]) <= TOGETHER
    routes = PrefixRoutes()
    assert routes.choose("v1", PROMPT, [0, 0]) == 0
    assert routes.choose("v1", PROMPT, [16, 0]) == 1
    assert routes.choose("v1", PROMPT, [1, 0]) == 1


def test_groups_stay_together() -> None:
    routes, loads, owners = PrefixRoutes(), [0, 0], []
    for group in range(8):
        prompt = [*range(BLOCK), *range(100 * group, 100 * group + 2 * BLOCK)]  # they begin alike
        chosen = []
        for _ in range(8):
            chosen.append(routes.choose("v1", prompt, loads))
            loads[chosen[-1]] += 1
        owners.append(set(chosen))
    assert [len(owner) for owner in owners] == [1] * 8
    assert loads == [32, 32]


def test_another_policy_has_read_nothing() -> None:
    routes = PrefixRoutes()
    assert routes.choose("v1", PROMPT, [0, 0]) == 0
    assert routes.choose("v2", PROMPT, [1, 0]) == 1


def test_a_replica_that_was_started_again_holds_nothing() -> None:
    routes = PrefixRoutes()
    routes.choose("v1", PROMPT, [0, 0])
    routes.forget(0)
    assert routes.choose("v1", PROMPT, [1, 0]) == 1
