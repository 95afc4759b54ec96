"""Which policies a run trains, and what does not go with several of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from nat.data_models.config import Config
from nat.data_models.finetuning import RewardFunctionConfig

from nat_plugin_evsys.calls import Call, DropReason
from nat_plugin_evsys.config import (
    EvsysExactMatchConfig,
    EvsysPolicyConfig,
    EvsysTrainerAdapterConfig,
    EvsysTrainerConfig,
    EvsysTrajectoryBuilderConfig,
    WarmStartConfig,
)
from nat_plugin_evsys.errors import ConfigError, RolloutsFailedError
from nat_plugin_evsys.finetuning.checks.trained_policies import check_several, trained_policies
from nat_plugin_evsys.finetuning.telemetry import RunExporters
from nat_plugin_evsys.finetuning.trajectory_builder import EvsysTrajectoryBuilder
from nat_plugin_evsys.finetuning.workflow.policy_rollouts import PolicyRollouts
from nat_plugin_evsys.finetuning.workflow.sessions import Rollouts
from nat_plugin_evsys.policy.recorder import Recorder
from nat_plugin_evsys.rollouts.attempts import Attempt


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


CALL = Call("id", 0, None, None, 0, [1], [2], [-1.0], "stop", 1.0, 1.0, [], [], {}, 0)


def check_rollouts(lost: int, *, second_lost: int | None = None) -> None:
    """The check of eight rollouts that call the proposer alone.

    Args:
        lost: how many timed out.
        second_lost: how many have no reward for the checker; default ``lost``.
    """

    def attempts(calls: list[Call], lost: int) -> list[Attempt]:
        timeout, said = DropReason.ROLLOUT_TIMEOUT, "it took longer than 1 s"
        return [
            Attempt("row", "run", calls, None, timeout, said)
            if number < lost
            else Attempt("row", "run", calls, 1.0, None, None)
            for number in range(8)
        ]

    config = two()
    builder = EvsysTrajectoryBuilder(EvsysTrajectoryBuilderConfig())
    builder.by_policy = [PolicyRollouts(each) for each in trained_policies(config, config.finetuning)]
    called, uncalled = builder.by_policy
    called.attempts = attempts([CALL], lost)
    uncalled.attempts = attempts([], lost if second_lost is None else second_lost)
    builder._check(Rollouts("epoch-0000", "rollout", 0, Recorder(), RunExporters({})))


@pytest.mark.parametrize("lost", [0, 1, 7])
def test_a_policy_that_no_rollout_happened_to_call_is_said_also_if_some_timed_out(
    lost: int, caplog: pytest.LogCaptureFixture
) -> None:
    check_rollouts(lost)
    assert "none of 8 rollouts called the policy `checker`" in caplog.text


@pytest.mark.parametrize("lost", [0, 8])
def test_a_policy_without_any_reward_ends_the_run(lost: int) -> None:
    with pytest.raises(RolloutsFailedError, match=r"none of the 8 rollouts has a reward \(rollout_timeout\)"):
        check_rollouts(lost, second_lost=8)
