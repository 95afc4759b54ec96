"""What does not go with rollouts, or records, that are older than the policy that trains on them."""

from __future__ import annotations

from typing import Any

import pytest
from nat.data_models.config import Config

from nat_plugin_evsys.config import (
    EvsysTraceBuilderConfig,
    EvsysTrainerConfig,
    EvsysTrajectoryBuilderConfig,
)
from nat_plugin_evsys.errors import ConfigError
from nat_plugin_evsys.finetuning.preflight import check_records
from nat_plugin_evsys.finetuning.traces.builder import EvsysTraceBuilder

Fixture = Any

ALGORITHMS: list[dict[str, Any]] = [{"algorithm": "sft", "min_reward": 1.0}, {"algorithm": "dpo"}, {"algorithm": "rl"}]


def traces(**settings: Any) -> EvsysTraceBuilderConfig:
    return EvsysTraceBuilderConfig.model_validate({"files": ["traces.jsonl"], **settings})


def config_of(builder: Any, **trainer: Any) -> Config:
    config = Config()
    config.trainers = {"t": EvsysTrainerConfig(**trainer)}
    config.trajectory_builders = {"b": builder}
    config.finetuning.trainer, config.finetuning.trajectory_builder = "t", "b"
    return config


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_records_do_not_overlap_with_training(algorithm: dict[str, Any]) -> None:
    config = config_of(traces(**algorithm), overlap_rollouts=True)
    with pytest.raises(ConfigError, match=r"trainers\.t\.overlap_rollouts does not go with evsys_trace_builder"):
        check_records(config, config.finetuning)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_rewards_of_records_do_not_collapse(algorithm: dict[str, Any]) -> None:
    config = config_of(traces(**algorithm), on_collapse="stop")
    with pytest.raises(ConfigError, match=r"trainers\.t\.on_collapse has no effect with evsys_trace_builder"):
        check_records(config, config.finetuning)


def test_rollouts_do() -> None:
    for config in (
        config_of(EvsysTrajectoryBuilderConfig(), on_collapse="stop"),
        config_of(EvsysTrajectoryBuilderConfig(), overlap_rollouts=True),
        config_of(traces(algorithm="dpo"), overlap_rollouts=False),
    ):
        check_records(config, config.finetuning)


def test_logprobs_cannot_be_recomputed_of_what_was_recorded(policy: Fixture, make_adapter: Fixture) -> None:
    adapter = make_adapter(policy, recompute_logprobs=True)
    with pytest.raises(ConfigError, match="recompute_logprobs does not go with algorithm `rl` of evsys_trace_builder"):
        EvsysTraceBuilder(traces(algorithm="rl")).prepare(adapter)
    with pytest.raises(ConfigError, match="recompute_logprobs does not go with overlap_rollouts"):
        adapter.expect_stale_calls("overlap_rollouts")
