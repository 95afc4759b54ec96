"""A ticket that one model routes and another checks, with models whose replies are given; and the config of the two."""

from __future__ import annotations

from pathlib import Path

import pytest
from langchain_core.language_models.fake_chat_models import FakeListChatModel
from nat.runtime.loader import load_config
from nat_helpdesk.checked import checked, verdict_reward

from nat_plugin_evsys.finetuning.checks.trained_policies import check_several, trained_policies

CONFIG = Path(__file__).parents[2] / "configs" / "two_policies.yml"


async def test_the_checker_reads_what_the_proposer_said() -> None:
    read: list[str] = []

    class Checker(FakeListChatModel):
        def _call(self, messages, *args, **kwargs):  # type: ignore[no-untyped-def]
            read.append(str(messages[-1].content))
            assert kwargs["response_format"]["json_schema"]["schema"]["enum"] == ["yes", "no"]
            return super()._call(messages, *args, **kwargs)

    proposer, checker = FakeListChatModel(responses=['"network"']), Checker(responses=['"yes"'])
    assert await checked(proposer, checker, "My wifi is broken.") == "network, yes"
    assert read == ["My wifi is broken. Team: network"]


@pytest.mark.parametrize(
    ("output", "reward"),
    [("network, yes", 1.0), ("network, no", 0.0), ("payroll, yes", 0.0), ("payroll, no", 1 / 3)],
)
def test_a_verdict_is_right_or_wrong(output: str, reward: float) -> None:
    assert verdict_reward(output, "network") == reward


def test_each_policy_of_the_config_has_its_own_reward() -> None:
    config = load_config(CONFIG)
    trained = trained_policies(config, config.finetuning)
    check_several(config, config.finetuning, trained)
    assert {each.name: each.reward for each in trained} == {"proposer": "right_team", "checker": "right_verdict"}
