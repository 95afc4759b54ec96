import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nat.data_models.finetuning import DPOItem, EpisodeItem, Trajectory

from nat_plugin_evsys.rollouts.roles import validate_episode_order


def trajectory(*roles: str) -> Trajectory:
    items = [EpisodeItem(role=role, content="", logprobs=[] if role == "assistant" else None) for role in roles]
    return Trajectory(episode=items, reward=0.0)


@pytest.mark.parametrize(
    "roles",
    [
        "user assistant",
        "system user assistant",
        "system system user assistant",
        "system assistant",
        "user assistant user assistant",
        "user assistant tool assistant",
        "user assistant tool tool function environment assistant",
        "user assistant tool user assistant",
        "user assistant environment user assistant tool assistant",
        "user system assistant",
    ],
)
def test_allowed(roles: str) -> None:
    validate_episode_order(trajectory(*roles.split()), "t")


@pytest.mark.parametrize(
    ("roles", "position", "role", "rule"),
    [
        ("assistant", 0, "assistant", "first item"),
        ("tool assistant", 0, "tool", "first item"),
        ("user", 0, "user", "last item"),
        ("user assistant user", 2, "user", "last item"),
        ("user assistant tool", 2, "tool", "last item"),
        ("user user assistant", 1, "user", "same role"),
        ("user assistant assistant", 2, "assistant", "same role"),
        ("user tool assistant", 1, "tool", "must follow an assistant turn or another observation, not `user`"),
        ("system function assistant", 1, "function", "not `system`"),
        ("user other assistant", 1, "other", "only system, user, assistant"),
    ],
)
def test_refused_with_trajectory_position_role_and_rule(roles: str, position: int, role: str, rule: str) -> None:
    with pytest.raises(ValueError, match="rollout 7 of group 3") as caught:
        validate_episode_order(trajectory(*roles.split()), "rollout 7 of group 3")
    assert f"item {position}, role `{role}`" in str(caught.value)
    assert rule in str(caught.value)


def test_empty_and_dpo_episodes_are_refused() -> None:
    with pytest.raises(ValueError, match="t: the episode is empty"):
        validate_episode_order(Trajectory(episode=[], reward=0.0), "t")
    pair = DPOItem(prompt="p", chosen_response="a", rejected_response="b")
    with pytest.raises(ValueError, match="t, item 0: a DPO preference pair"):
        validate_episode_order(Trajectory(episode=[pair], reward=0.0), "t")


ROLES = ["system", "user", "assistant", "tool", "function", "environment", "other"]
SEEN = {"tool", "function", "environment"}


def obeys_the_rules(roles: list[str]) -> bool:
    """The rules once more, as one expression per sentence of the specification."""
    pairs = list(itertools.pairwise(roles))
    return (
        roles[0] in ("system", "user")
        and roles[-1] == "assistant"
        and "other" not in roles
        and all(a != b or b == "system" or b in SEEN for a, b in pairs)
        and all(a == "assistant" or a in SEEN for a, b in pairs if b in SEEN)
    )


@given(st.lists(st.sampled_from(ROLES), min_size=1, max_size=7))
def test_agrees_with_the_rules_written_as_one_expression(roles: list[str]) -> None:
    try:
        validate_episode_order(trajectory(*roles), "t")
        accepted = True
    except ValueError:
        accepted = False
    assert accepted == obeys_the_rules(roles)
