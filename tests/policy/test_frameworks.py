"""The clients of the other frameworks, as far as that needs none of them; ``make test-frameworks`` runs each."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
from nat.builder.framework_enum import LLMFrameworkEnum
from nat.cli.type_registry import GlobalTypeRegistry

import nat_plugin_evsys.register  # noqa: F401 - registers them
from nat_plugin_evsys.config import EvsysPolicyConfig
from nat_plugin_evsys.errors import ConfigError
from nat_plugin_evsys.policy.frameworks import CLIENTS, open_framework_client
from nat_plugin_evsys.policy.policy import Policy

IMPORTED_AS = {LLMFrameworkEnum.ADK: "google.adk", LLMFrameworkEnum.AUTOGEN: "autogen_core"}


def test_every_framework_of_nat_has_a_client() -> None:
    assert set(CLIENTS) == set(LLMFrameworkEnum) - {LLMFrameworkEnum.LANGCHAIN}
    for framework in LLMFrameworkEnum:
        GlobalTypeRegistry.get().get_llm_client(config_type=EvsysPolicyConfig, wrapper_type=framework)


@pytest.mark.parametrize("framework", CLIENTS)
async def test_a_framework_that_is_not_installed_is_named(framework: LLMFrameworkEnum, serve: Any) -> None:
    if importlib.util.find_spec(IMPORTED_AS.get(framework, framework.value)) is not None:
        pytest.skip(f"{framework.value} is installed")
    endpoint = serve(["unused"]).endpoint
    with pytest.raises(ConfigError, match=f"{framework.value} client: .*pip install nvidia-nat-"):
        async with open_framework_client(framework, endpoint, model="builtin/tiny", timeout=20):
            pass


async def test_the_responses_api_is_for_langchain() -> None:
    policy = Policy(EvsysPolicyConfig(base_model="builtin/tiny", api_type="responses"))
    with pytest.raises(ConfigError, match=r"api_type: responses is for LangChain.* not for agno; remove it"):
        async with policy.framework_client(LLMFrameworkEnum.AGNO):
            pass
