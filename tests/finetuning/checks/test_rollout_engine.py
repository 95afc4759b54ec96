"""Before a run whose rollouts vLLM samples: vLLM is there, and what it records is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nat_plugin_evsys.config import EvsysPolicyConfig, EvsysTrainerAdapterConfig
from nat_plugin_evsys.errors import ConfigError
from nat_plugin_evsys.finetuning.checks.trained_policies import TrainedPolicy
from nat_plugin_evsys.finetuning.preflight import check_rollout_engine


def trained(vllm: dict[str, Any] | None, **adapter: Any) -> TrainedPolicy:
    policy = EvsysPolicyConfig.model_validate({"base_model": "m", "rollout_engine": "vllm", "vllm": vllm})
    settings = EvsysTrainerAdapterConfig.model_validate({"policy": "policy", **adapter})
    return TrainedPolicy("policy", policy, "adapter", settings, "reward")


def test_a_program_that_is_not_installed_is_named_before_the_run() -> None:
    with pytest.raises(ConfigError, match="no program '/no/vllm'"):
        check_rollout_engine(trained({"command": "/no/vllm"}))


def test_recomputed_logprobs_would_leave_the_drift_uncorrected(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trainer_adapters\.adapter: recompute_logprobs .* drift"):
        check_rollout_engine(trained({"base_url": "http://127.0.0.1:1"}, recompute_logprobs=True))


def test_a_program_or_a_running_server_is_enough(tmp_path: Path) -> None:
    program = tmp_path / "vllm"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    check_rollout_engine(trained({"command": str(program)}))
    check_rollout_engine(trained({"base_url": "http://127.0.0.1:1"}))
