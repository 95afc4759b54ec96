"""Which policies a run trains, with which adapters and on which rewards; and what does not go with several."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nat_plugin_evsys.config import (
    EvsysPolicyConfig,
    EvsysTraceBuilderConfig,
    EvsysTrainerAdapterConfig,
    EvsysTrainerConfig,
)
from nat_plugin_evsys.errors import ConfigError

if TYPE_CHECKING:
    from nat.data_models.config import Config
    from nat.data_models.finetuning import FinetuneConfig, TrajectoryBuilderConfig

_FOLDER_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")


def builder_of(config: Config, finetuning: FinetuneConfig) -> TrajectoryBuilderConfig | None:
    """The run's trajectory builder; None if there is none of that name."""
    return config.trajectory_builders.get(finetuning.trajectory_builder or "")


@dataclass(frozen=True, slots=True)
class TrainedPolicy:
    """A policy that a run trains.

    Attributes:
        name: what ``llms:`` calls it.
        adapter_name: what ``trainer_adapters:`` calls its adapter.
        reward: the evaluator that rewards it.
    """

    name: str
    policy: EvsysPolicyConfig
    adapter_name: str
    adapter: EvsysTrainerAdapterConfig
    reward: str


def trained_policies(config: Config, finetuning: FinetuneConfig) -> list[TrainedPolicy]:
    """That of ``finetuning.trainer_adapter``, then those of the trainer's ``also_train``.

    Raises:
        ConfigError: an adapter, its policy or its reward is not in this YAML, or cannot be trained on.
    """
    own = _trained(config, finetuning, finetuning.trainer_adapter or "", "finetuning.trainer_adapter")
    what = f"trainers.{finetuning.trainer}.also_train"
    return [own, *(_trained(config, finetuning, name, what) for name in _also_train(config, finetuning))]


def check_several(config: Config, finetuning: FinetuneConfig, trained: list[TrainedPolicy]) -> None:
    """Refuse what does not go with several policies under training.

    Raises:
        ConfigError: names the setting.
    """
    if len(trained) == 1:
        return
    for one, other in itertools.combinations(trained, 2):
        if one.name == other.name:
            raise ConfigError(
                f"also_train: two trainer adapters train the policy `{one.name}`; give each a policy of its own"
            )
        if one.policy == other.policy:
            raise ConfigError(
                f"llms.{one.name} and llms.{other.name} have the same settings, so they are one policy; to train two, "
                "give one of them another seed"
            )
    for each in trained[1:]:
        if not _FOLDER_NAME.fullmatch(each.name):
            raise ConfigError(
                f"also_train: the policy `{each.name}` is to have a folder of its name; call it by letters, digits, "
                "`_` and `-`"
            )
    trainer = config.trainers.get(finetuning.trainer or "")
    builder = builder_of(config, finetuning)
    refused = {
        "finetuning.target_model (each trainer adapter names its policy)": finetuning.target_model is not None,
        "warm_start (start each policy alone, and set its checkpoint: to the path of the result)": isinstance(
            trainer, EvsysTrainerConfig
        )
        and trainer.warm_start is not None,
        "dynamic_sampling (what teaches one policy nothing may teach the other)": bool(
            getattr(builder, "dynamic_sampling", 0)
        ),
        "evsys_trace_builder (a record is of one policy)": isinstance(builder, EvsysTraceBuilderConfig),
    }
    if found := [what for what, is_set in refused.items() if is_set]:
        raise ConfigError(f"also_train: several policies do not go with {'; '.join(found)}; remove it")


def _also_train(config: Config, finetuning: FinetuneConfig) -> list[str]:
    trainer = config.trainers.get(finetuning.trainer or "")
    return list(trainer.also_train) if isinstance(trainer, EvsysTrainerConfig) else []


def _trained(config: Config, finetuning: FinetuneConfig, adapter_name: str, what: str) -> TrainedPolicy:
    adapter = config.trainer_adapters.get(adapter_name)
    if not isinstance(adapter, EvsysTrainerAdapterConfig):
        raise ConfigError(
            f"{what} is `{adapter_name or None}`, which is not an evsys_trainer_adapter; "
            "the evsys trainer needs `_type: evsys_trainer_adapter`"
        )
    policy = config.llms.get(adapter.policy)
    if not isinstance(policy, EvsysPolicyConfig):
        policies = sorted(name for name, llm in config.llms.items() if isinstance(llm, EvsysPolicyConfig))
        raise ConfigError(
            f"trainer adapter: policy `{adapter.policy}` is not an evsys_policy LLM; `llms:` has {policies}"
        )
    if policy.top_p < 1:
        raise ConfigError(
            f"llms.{adapter.policy}.top_p is {policy.top_p:g}, but calls that were sampled from a cut distribution "
            "cannot be trained on; set top_p: 1 for `nat finetune` (any temperature is fine)"
        )
    return TrainedPolicy(
        adapter.policy, policy, adapter_name, adapter, _reward(config, finetuning, adapter, adapter_name)
    )


def _reward(config: Config, finetuning: FinetuneConfig, adapter: EvsysTrainerAdapterConfig, name: str) -> str:
    """The adapter's own ``reward``, or ``finetuning.reward_function``; it must name a configured evaluator."""
    evaluators = sorted(config.eval.evaluators)
    reward = adapter.reward or finetuning.reward_function
    if reward is None:
        raise ConfigError(
            f"finetuning.reward_function is not set; set `reward_function: {{name: …}}` to one of {evaluators}"
        )
    if reward.name not in config.eval.evaluators:
        setting = "finetuning.reward_function" if adapter.reward is None else f"trainer_adapters.{name}.reward"
        raise ConfigError(f"{setting} names `{reward.name}`, but eval.evaluators has {evaluators}; name one of these")
    return reward.name
