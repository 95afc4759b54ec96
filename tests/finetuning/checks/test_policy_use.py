"""Which workflows are refused before a token is sampled, and which judges are warned about, on NAT's own configs."""

from __future__ import annotations

from typing import Any

import pytest
from nat.data_models.config import Config
from nat.llm.openai_llm import OpenAIModelConfig
from nat.plugins.langchain.control_flow.sequential_executor import SequentialExecutorConfig
from nat.plugins.langchain.langgraph_workflow import LanggraphWrapperConfig
from nat.tool.chat_completion import ChatCompletionConfig
from odd_agents import OddAgentConfig, OddJudgeConfig

from nat_plugin_evsys.config import EvsysPolicyConfig
from nat_plugin_evsys.errors import ConfigError
from nat_plugin_evsys.finetuning.checks.policy_use import check_workflow_uses, judge_notice

LLMS = {
    "policy": EvsysPolicyConfig(base_model="builtin/tiny"),
    "same": EvsysPolicyConfig(base_model="builtin/tiny"),
    "frozen": EvsysPolicyConfig(base_model="builtin/tiny", checkpoint="none"),
    "other": OpenAIModelConfig(model_name="m", api_key="k"),
}
ASKS_OTHER = ChatCompletionConfig(llm_name="other")


def config_of(workflow: Any, **sections: Any) -> Config:
    return Config().model_copy(update={"workflow": workflow, "llms": LLMS, **sections}, deep=True)


@pytest.mark.parametrize(
    "config",
    [
        config_of(ChatCompletionConfig(llm_name="policy")),
        config_of(SequentialExecutorConfig(tool_list=["f"]), functions={"f": ChatCompletionConfig(llm_name="policy")}),
        config_of(OddAgentConfig(llm_name="anything")),  # a component of somebody else
        config_of(ASKS_OTHER, functions={"f": OddAgentConfig()}),
        config_of(LanggraphWrapperConfig(dependencies=["."], graph="graph.py:graph")),
        config_of(ASKS_OTHER, llms={**LLMS, "policy": EvsysPolicyConfig(base_model="builtin/tiny", port=8123)}),
    ],
)
def test_what_may_call_the_policy_is_not_refused(config: Config) -> None:
    check_workflow_uses(config, "policy")


@pytest.mark.parametrize(
    "config",
    [
        config_of(ASKS_OTHER),
        config_of(SequentialExecutorConfig(tool_list=["f"]), functions={"f": ASKS_OTHER}),
    ],
)
def test_what_asks_only_others_is_refused(config: Config) -> None:
    with pytest.raises(ConfigError, match=r"uses \['other'\], not the policy `policy`"):
        check_workflow_uses(config, "policy")


@pytest.mark.parametrize(
    ("asked", "warned"), [("policy", True), ("same", True), ("frozen", False), ("other", False), (None, False)]
)
def test_a_policy_that_rewards_itself_is_warned_about(asked: str | None, warned: bool) -> None:
    config = config_of(ChatCompletionConfig(llm_name="policy"))
    config.eval.evaluators = {"judge": OddJudgeConfig(llm_name=asked)}
    notice = judge_notice(config, "judge", "policy")
    assert (notice is not None) == warned
    if notice is not None:
        assert notice.startswith(f"eval.evaluators.judge.llm_name is `{asked}`: the policy rewards itself")
