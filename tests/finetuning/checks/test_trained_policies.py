"""Which policies a run trains, and what does not go with several of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from nat.data_models.config import Config
from nat.data_models.finetuning import RewardFunctionConfig

from nat_plugin_evsys.config import (
    EvsysExactMatchConfig,
    EvsysPolicyConfig,
    EvsysTrainerAdapterConfig,
    EvsysTrainerConfig,
    EvsysTrajectoryBuilderConfig,
    WarmStartConfig,
)
from nat_plugin_evsys.errors import ConfigError
from nat_plugin_evsys.finetuning.checks.trained_policies import check_several, trained_policies


def two() -> Config:
    """A proposer with the run's reward, and a checker with its own."""
    config = Config()
    config.llms = {
        name: EvsysPolicyConfig(base_model="builtin/tiny", seed=seed)
        for seed, name in enumerate(("proposer", "checker", "third/one"))
    }
    config.eval.evaluators = {"solved": EvsysExactMatchConfig(), "noticed": EvsysExactMatchConfig(mode="contains")}
    config.trainer_adapters = {
        "first": EvsysTrainerAdapterConfig(policy="proposer"),
        "second": EvsysTrainerAdapterConfig(policy="checker", reward=RewardFunctionConfig(name="noticed")),
    }
    config.trainers = {"trainer": EvsysTrainerConfig(also_train=["second"])}
    config.trajectory_builders = {"builder": EvsysTrajectoryBuilderConfig()}
    config.finetuning.trainer, config.finetuning.trainer_adapter = "trainer", "first"
    config.finetuning.trajectory_builder = "builder"
    config.finetuning.reward_function = RewardFunctionConfig(name="solved")
    return config


def test_each_adapter_trains_its_policy_on_its_reward() -> None:
    config = two()
    trained = trained_policies(config, config.finetuning)
    check_several(config, config.finetuning, trained)
    assert [(each.name, each.adapter_name, each.reward) for each in trained] == [
        ("proposer", "first", "solved"),
        ("checker", "second", "noticed"),
    ]


def same_policy(config: Config) -> None:
    config.trainer_adapters["second"] = EvsysTrainerAdapterConfig(policy="proposer")


def same_settings(config: Config) -> None:
    config.llms["checker"] = config.llms["proposer"]


def name_of_no_folder(config: Config) -> None:
    config.trainer_adapters["second"] = EvsysTrainerAdapterConfig(policy="third/one")


def target_model(config: Config) -> None:
    config.finetuning.target_model = "checker"


def warm_start(config: Config) -> None:
    start = WarmStartConfig(demonstrations="rows.json")  # type: ignore[arg-type]  # pydantic makes it a path
    config.trainers["trainer"] = EvsysTrainerConfig(also_train=["second"], warm_start=start)


def dynamic_sampling(config: Config) -> None:
    config.trajectory_builders["builder"] = EvsysTrajectoryBuilderConfig(dynamic_sampling=1)


def unknown_adapter(config: Config) -> None:
    del config.trainer_adapters["second"]


def unknown_reward(config: Config) -> None:
    config.trainer_adapters["second"].reward = RewardFunctionConfig(name="nticed")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (same_policy, "two trainer adapters train the policy `proposer`"),
        (same_settings, "llms.proposer and llms.checker have the same settings.*give one of them another seed"),
        (name_of_no_folder, "the policy `third/one` is to have a folder of its name"),
        (target_model, "several policies do not go with finetuning.target_model"),
        (warm_start, "do not go with warm_start .*set its checkpoint: to the path of the result"),
        (dynamic_sampling, "do not go with dynamic_sampling"),
        (unknown_adapter, "trainers.trainer.also_train is `second`, which is not an evsys_trainer_adapter"),
        (unknown_reward, r"trainer_adapters.second.reward names `nticed`, but eval.evaluators has \['noticed'"),
    ],
)
def test_what_does_not_go_with_several(change: Callable[[Config], None], message: str) -> None:
    config = two()
    change(config)
    with pytest.raises(ConfigError, match=message):
        check_several(config, config.finetuning, trained_policies(config, config.finetuning))
