"""A dead address of an evaluator or a workflow is named with its setting; one where somebody listens is not."""

from __future__ import annotations

import socket

from nat.data_models.config import Config
from nat.llm.openai_llm import OpenAIModelConfig
from odd_agents import OddJudgeConfig, RelayConfig, SpeakerConfig

from nat_plugin_evsys.calls import DropReason
from nat_plugin_evsys.finetuning.checks.addresses import with_dead_addresses
from nat_plugin_evsys.rollouts.attempts import Attempt


def llm(port: int) -> OpenAIModelConfig:
    return OpenAIModelConfig(model_name="m", api_key="k", base_url=f"http://127.0.0.1:{port}/v1")


def test_dead_addresses_are_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as living, socket.create_server(("127.0.0.1", 0)) as other:
        port, dead = living.getsockname()[1], other.getsockname()[1]
        other.close()
        config = Config(
            workflow=RelayConfig(functions=["first"]),
            functions={"first": SpeakerConfig(llm_name="alive")},
            llms={"alive": llm(port), "gone": llm(dead)},
        )
        config.eval.evaluators = {"judge": OddJudgeConfig(llm_name="gone")}
        attempts = [
            Attempt("1", "a", [], None, DropReason.EVALUATOR_ERROR, "Connection error."),
            Attempt("2", "b", [], 0.0, None, "LookupError: none"),
            Attempt("3", "c", [], 1.0, None, None),
        ]
        judge, workflow, fine = with_dead_addresses(attempts, config, "judge")
    assert f"uses `llms.gone.base_url`, and nothing answers there (http://127.0.0.1:{dead}/v1: " in judge.error
    assert (workflow.error, fine.error) == ("LookupError: none", None)
