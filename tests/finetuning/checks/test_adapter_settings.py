"""Which settings of the trainer adapter go with which trajectory builder."""

from __future__ import annotations

import re
from typing import Any

import pytest
from nat.data_models.config import Config
from nat.data_models.finetuning import RewardFunctionConfig

from nat_plugin_evsys.config import (
    EvsysExactMatchConfig,
    EvsysPolicyConfig,
    EvsysTraceBuilderConfig,
    EvsysTrainerAdapterConfig,
    EvsysTrajectoryBuilderConfig,
)
from nat_plugin_evsys.errors import ConfigError
from nat_plugin_evsys.finetuning.checks.trained_policies import trained_policies
from nat_plugin_evsys.finetuning.preflight import check_builder_uses, check_group_size, same_attempts_notice


def check(builder: Any, temperature: float = 1.0, **adapter: Any) -> str | None:
    """Raises what is refused; returns the notice."""
    config = Config()
    config.llms = {"policy": EvsysPolicyConfig(base_model="builtin/tiny", temperature=temperature)}
    config.eval.evaluators = {"solved": EvsysExactMatchConfig()}
    config.trainer_adapters = {"a": EvsysTrainerAdapterConfig(policy="policy", **adapter)}
    config.trajectory_builders = {"b": builder}
    finetuning = config.finetuning
    finetuning.trainer_adapter, finetuning.trajectory_builder = "a", "b"
    finetuning.reward_function = RewardFunctionConfig(name="solved")
    (trained,) = trained_policies(config, finetuning)
    check_group_size(config, finetuning, trained.adapter)
    check_builder_uses(config, finetuning, trained)
    return same_attempts_notice(config, finetuning, trained)


def rollouts(**settings: Any) -> EvsysTrajectoryBuilderConfig:
    return EvsysTrajectoryBuilderConfig(**settings)


def traces(**settings: Any) -> EvsysTraceBuilderConfig:
    return EvsysTraceBuilderConfig.model_validate({"files": ["traces.jsonl"], **settings})


@pytest.mark.parametrize(
    ("builder", "adapter"),
    [
        (rollouts(), {}),
        (rollouts(num_generations=1), {"advantage": "reward"}),
        (rollouts(num_generations=1), {"loss_fn": "cross_entropy"}),
        (rollouts(dynamic_sampling=1), {}),
        (traces(algorithm="dpo"), {"dpo_beta": 0.1, "dpo_batch_size": 4, "retokenize": True}),
        (traces(algorithm="sft", min_reward=1.0), {"retokenize": True}),
    ],
)
def test_what_goes_together(builder: Any, adapter: dict[str, Any]) -> None:
    check(builder, **adapter)


@pytest.mark.parametrize(
    ("builder", "adapter", "message"),
    [
        (rollouts(num_generations=1), {}, "num_generations is 1, but advantage `group_mean_std` compares"),
        (
            rollouts(dynamic_sampling=1),
            {"advantage": "reward"},
            "or set advantage: group_mean",
        ),
        (
            rollouts(dynamic_sampling=1),
            {"loss_fn": "cross_entropy"},
            "with loss_fn: cross_entropy these are trained on too; remove dynamic_sampling, or choose another loss_fn",
        ),
        (rollouts(), {"retokenize": True}, "trainer_adapters.a: retokenize has no effect on rollouts"),
        (rollouts(), {"dpo_beta": 0.1}, "trainer_adapters.a: there are no preference pairs, so dpo_beta would have no"),
        (
            traces(algorithm="rl"),
            {"dpo_beta": 0.2, "dpo_batch_size": 4},
            "dpo_batch_size, dpo_beta would have no effect; remove it, or .* algorithm: dpo",
        ),
    ],
)
def test_what_does_not(builder: Any, adapter: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(builder, **adapter)


@pytest.mark.parametrize("settings", [{"failed_groups": "batch_mean"}, {"lr_scaling": "unsolved"}], ids=str)
@pytest.mark.parametrize("without_groups", [{"advantage": "reward"}, {"loss_fn": "cross_entropy"}], ids=str)
def test_what_compares_groups_is_refused_where_none_are(
    settings: dict[str, Any], without_groups: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=f"{min(settings)}.* ha(s|ve) no effect"):
        EvsysTrainerAdapterConfig.model_validate({"policy": "policy", **settings, **without_groups})


def test_attempts_that_cannot_differ_are_said_before_the_run() -> None:
    notice = check(rollouts(num_generations=4), temperature=0.0)
    assert notice is not None
    assert notice.startswith("llms.policy.temperature is 0, so the 4 attempts at a row are the same reply")
    assert check(rollouts(num_generations=4)) is None


@pytest.mark.parametrize(
    ("loss_fn", "config", "wanted"),
    [
        ("ppo", {"clip_low": 0.2}, "unknown key 'clip_low'; it takes clip_low_threshold, clip_high_threshold"),
        ("ppo", {"clip_low_threshold": 1.5}, "clip_low_threshold 1.5 is above clip_high_threshold 1.2"),
        ("dro", {"betta": 1.0}, "unknown key 'betta'; it takes beta"),
        ("dro", {"beta": -1.0}, "beta is -1.0; give a finite number >= 0"),
        ("importance_sampling", {"beta": 1.0}, "unknown key 'beta'; it takes no keys at all"),
    ],
)
def test_settings_of_a_loss_are_checked_with_the_yaml(loss_fn: Any, config: dict[str, float], wanted: str) -> None:
    with pytest.raises(ValueError, match=re.escape(wanted)):
        EvsysTrainerAdapterConfig(policy="policy", loss_fn=loss_fn, loss_fn_config=config)
