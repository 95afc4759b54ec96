"""Checks before a model is loaded or a token sampled. Every failure is one line that says what to type."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from nat_plugin_evsys.config import (
    EvsysPolicyConfig,
    EvsysTraceBuilderConfig,
    EvsysTrainerAdapterConfig,
    EvsysTrainerConfig,
    EvsysTrajectoryBuilderConfig,
)
from nat_plugin_evsys.errors import ConfigError
from nat_plugin_evsys.finetuning.checks.datasets import check_dataset, content_of, dataset_of
from nat_plugin_evsys.finetuning.checks.policy_use import check_workflow_uses, judge_notice
from nat_plugin_evsys.finetuning.checks.trained_policies import (
    TrainedPolicy,
    builder_of,
    check_several,
    trained_policies,
)
from nat_plugin_evsys.finetuning.telemetry import check_exporters
from nat_plugin_evsys.rollouts.targets import GROUP_SEPARATOR, WORKFLOW

if TYPE_CHECKING:
    from nat.data_models.config import Config
    from nat.data_models.dataset_handler import EvalDatasetBaseConfig
    from nat.data_models.finetuning import FinetuneConfig, FinetuneRunConfig

logger = logging.getLogger(__name__)


def check_run(config: Config, finetuning: FinetuneConfig) -> None:
    """Check everything that can be checked without a model; with ``base_url``, this asks the Tinker service.

    Raises:
        ServiceUnavailableError: the service does not answer.
        ConfigError: settings that cannot work together; the message names the setting and what to change.
        DataError: a dataset row that cannot be used.
    """
    run = finetuning.run_configuration
    if run is not None and run.endpoint is not None:
        raise ConfigError("--endpoint: rollouts must run in this process so that their tokens are recorded; remove it")
    check_profiler()
    trained = trained_policies(config, finetuning)
    check_several(config, finetuning, trained)
    check_targets(config, finetuning, trained[0])
    for each in trained:
        check_workflow_uses(config, each.name)
        if notice := judge_notice(config, each.reward, each.name):
            logger.warning("%s", notice)
        check_output_dirs(each.name, each.policy, finetuning.output_dir)
        check_rollout_engine(each)
        check_group_size(config, finetuning, each.adapter)
        check_curriculum(finetuning, each)
        if notice := same_attempts_notice(config, finetuning, each):
            logger.warning("%s", notice)
        check_builder_uses(config, finetuning, each)
    check_records(config, finetuning)
    check_exporters(config)
    given = None if run is None else run.dataset
    what = "--dataset" if given else "eval.general.dataset"
    dataset = dataset_of(config, given, what)
    check_dataset(config, dataset, what)
    if notice := few_rows_notice(config, finetuning, dataset):
        logger.warning("%s", notice)
    for each in trained:
        check_service(each.policy)


def check_profiler() -> None:
    """NAT records LLM and tool steps only when its profiler package is installed."""
    if importlib.util.find_spec("nat.plugins.profiler") is None:
        raise ConfigError(
            "nvidia-nat-profiler is not installed, so NAT records no LLM steps; pip install nvidia-nat-profiler"
        )


def check_targets(config: Config, finetuning: FinetuneConfig, trained: TrainedPolicy) -> None:
    """``target_functions`` name functions of the workflow, and ``target_model`` the policy under training."""
    known = [WORKFLOW, *config.functions, *config.function_groups]
    for name in finetuning.target_functions:
        if name not in known and name.split(GROUP_SEPARATOR)[0] not in config.function_groups:
            raise ConfigError(
                f"finetuning.target_functions has `{name}`, but the workflow has {known}; name some of these"
            )
    if not finetuning.target_functions:
        raise ConfigError(f"finetuning.target_functions is empty, so nothing would be trained; name some of {known}")
    if finetuning.target_model not in (None, trained.name, trained.policy.base_model):
        raise ConfigError(
            f"finetuning.target_model is `{finetuning.target_model}`, but the policy `{trained.name}` "
            f"({trained.policy.base_model}) is what is trained; remove target_model, or name the policy"
        )


def check_output_dirs(policy_name: str, policy: EvsysPolicyConfig, output_dir: Path) -> None:
    """``checkpoint: latest`` looks where the runs are written."""
    if policy.output_dir.resolve() != output_dir.resolve():
        raise ConfigError(
            f"llms.{policy_name}.output_dir is {policy.output_dir}, but finetuning.output_dir is {output_dir}; "
            "set both to the same directory, so that the trained adapter is found when it is served"
        )


def check_service(policy: EvsysPolicyConfig) -> None:
    """With ``base_url``: the service must answer, accept the key and serve the base model. Waits a few seconds at most.

    Raises:
        ServiceUnavailableError: it does not answer.
        ConfigError: there is no key, the service rejects it, or it does not serve ``base_model``.
    """
    if policy.base_url is None:
        return
    from nat_plugin_evsys.backends.remote.service import TinkerService

    TinkerService.of(policy).check(policy.base_model)


def check_rollout_engine(trained: TrainedPolicy) -> None:
    """vLLM must be there, and its logprobs used: they correct for what it computes otherwise than the learner."""
    policy = trained.policy
    if policy.rollout_engine != "vllm":
        return
    if trained.adapter.recompute_logprobs:
        raise ConfigError(
            f"trainer_adapters.{trained.adapter_name}: recompute_logprobs takes the learner's logprobs for those of "
            "what vLLM sampled, so nothing would correct the drift between them; remove it, or rollout_engine: vllm"
        )
    if policy.vllm is None or policy.vllm.base_url is None:
        from nat_plugin_evsys.backends.vllm.server import find_program

        find_program("vllm" if policy.vllm is None else policy.vllm.command)


def check_group_size(config: Config, finetuning: FinetuneConfig, adapter: EvsysTrainerAdapterConfig) -> None:
    """A group-relative advantage needs at least two attempts at each row, and dynamic sampling such an advantage."""
    builder = builder_of(config, finetuning)
    if isinstance(builder, EvsysTraceBuilderConfig):
        return
    if not isinstance(builder, EvsysTrajectoryBuilderConfig):
        raise ConfigError(
            f"finetuning.trajectory_builder is `{finetuning.trajectory_builder}`, which is not an "
            "evsys_trajectory_builder; the evsys trainer needs `_type: evsys_trajectory_builder` (or "
            "evsys_trace_builder)"
        )
    supervised = adapter.loss_fn == "cross_entropy"
    if builder.num_generations == 1 and adapter.advantage != "reward" and not supervised:
        raise ConfigError(
            f"num_generations is 1, but advantage `{adapter.advantage}` compares the attempts of a group; "
            "set num_generations to 2 or more, or advantage: reward"
        )
    if builder.dynamic_sampling and (adapter.advantage == "reward" or supervised):
        setting, other = "advantage: reward", "set advantage: group_mean"
        if supervised:
            setting, other = "loss_fn: cross_entropy", "choose another loss_fn"
        raise ConfigError(
            f"dynamic_sampling replaces groups whose rewards are all the same, but with {setting} these are trained on "
            f"too; remove dynamic_sampling, or {other}"
        )


def check_curriculum(finetuning: FinetuneConfig, trained: TrainedPolicy) -> None:
    """The curriculum drops groups of equal rewards, which ``failed_groups`` is about, before the adapter sees them."""
    curriculum = finetuning.curriculum_learning
    if curriculum.enabled and curriculum.min_reward_diff > 0 and trained.adapter.failed_groups != "drop":
        raise ConfigError(
            f"trainer_adapters.{trained.adapter_name}: failed_groups `{trained.adapter.failed_groups}` has no effect "
            "with curriculum_learning, which drops groups whose rewards are equal; remove it, or set "
            "finetuning.curriculum_learning.min_reward_diff to 0"
        )


def same_attempts_notice(config: Config, finetuning: FinetuneConfig, trained: TrainedPolicy) -> str | None:
    """What to say where all attempts at a row sample the same reply, unless the agent chooses a temperature."""
    builder = builder_of(config, finetuning)
    if not isinstance(builder, EvsysTrajectoryBuilderConfig) or trained.policy.temperature > 0:
        return None
    return (
        f"llms.{trained.name}.temperature is 0, so the {builder.num_generations} attempts at a row are the same reply "
        "unless the agent's requests set a temperature, and equal rewards teach nothing; set temperature: 1 "
        "(eval_temperature is what everything else uses)"
    )


def few_rows_notice(config: Config, finetuning: FinetuneConfig, dataset: EvalDatasetBaseConfig) -> str | None:
    """What to say where ``rows_per_epoch`` divides nothing, since the dataset has no more rows than that."""
    builder = builder_of(config, finetuning)
    size = builder.rows_per_epoch if isinstance(builder, EvsysTrajectoryBuilderConfig) else None
    rows = None if size is None else content_of(dataset).get("rows")
    if size is None or rows is None or size <= rows:
        return None
    return f"rows_per_epoch is {size}, but the dataset has {rows} rows, so every epoch visits all of them"


def check_builder_uses(config: Config, finetuning: FinetuneConfig, trained: TrainedPolicy) -> None:
    """The adapter's settings that are about what only some trajectory builders give."""
    builder = builder_of(config, finetuning)
    adapter, name = trained.adapter, f"trainer_adapters.{trained.adapter_name}"
    if adapter.retokenize and not isinstance(builder, EvsysTraceBuilderConfig):
        raise ConfigError(
            f"{name}: retokenize has no effect on rollouts, whose tokens are those that were sampled; remove it"
        )
    useless = sorted({"dpo_beta", "dpo_batch_size"} & adapter.model_fields_set)
    if useless and not (isinstance(builder, EvsysTraceBuilderConfig) and builder.algorithm == "dpo"):
        raise ConfigError(
            f"{name}: there are no preference pairs, so {', '.join(useless)} would have no effect; remove it, or train "
            "on recorded traces with algorithm: dpo (evsys_trace_builder)"
        )


def check_records(config: Config, finetuning: FinetuneConfig) -> None:
    """Recorded trajectories are not rolled out: nothing of them overlaps with training, and their rewards are fixed."""
    trainer = config.trainers.get(finetuning.trainer or "")
    builder = builder_of(config, finetuning)
    if not isinstance(builder, EvsysTraceBuilderConfig) or not isinstance(trainer, EvsysTrainerConfig):
        return
    if trainer.overlap_rollouts:
        raise ConfigError(
            f"trainers.{finetuning.trainer}.overlap_rollouts does not go with evsys_trace_builder, which reads what is "
            "recorded and makes no rollouts to train on; remove overlap_rollouts"
        )
    if trainer.on_collapse != "continue":
        raise ConfigError(
            f"trainers.{finetuning.trainer}.on_collapse has no effect with evsys_trace_builder: the rewards of what is "
            "recorded are the same in each epoch, and so do not show a collapse; remove on_collapse"
        )


def resolve_config(run: FinetuneRunConfig | None) -> Config:
    """The configuration object behind a run: as the CLI passes it, or loaded from its path."""
    from nat.data_models.config import Config
    from nat.runtime.loader import load_config

    if run is None or run.config_file is None:
        raise ConfigError("finetuning.run_configuration has no config_file; start the run with `nat finetune`")
    return run.config_file if isinstance(run.config_file, Config) else load_config(Path(str(run.config_file)))
