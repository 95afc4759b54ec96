"""What NAT discovers through the ``nat.plugins`` entry point: one short function a component, imports light."""

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from nat.builder.builder import Builder, EvalBuilder
from nat.builder.evaluator import EvaluatorInfo
from nat.builder.framework_enum import LLMFrameworkEnum
from nat.builder.llm import LLMProviderInfo
from nat.cli.register_workflow import (
    register_evaluator,
    register_llm_client,
    register_llm_provider,
    register_trainer,
    register_trainer_adapter,
    register_trajectory_builder,
)

from nat_plugin_evsys.config import (
    EvsysExactMatchConfig,
    EvsysFunctionCallConfig,
    EvsysPolicyConfig,
    EvsysTraceBuilderConfig,
    EvsysTrainerAdapterConfig,
    EvsysTrainerConfig,
    EvsysTrajectoryBuilderConfig,
)
from nat_plugin_evsys.config.suggestions import suggest_types
from nat_plugin_evsys.policy.frameworks import CLIENTS

if TYPE_CHECKING:
    from langchain_openai import ChatOpenAI

    from nat_plugin_evsys.finetuning.traces.builder import EvsysTraceBuilder
    from nat_plugin_evsys.finetuning.trainer import EvsysTrainer
    from nat_plugin_evsys.finetuning.trainer_adapter import EvsysTrainerAdapter
    from nat_plugin_evsys.finetuning.trajectory_builder import EvsysTrajectoryBuilder


suggest_types()


@register_llm_provider(config_type=EvsysPolicyConfig)
async def evsys_policy(config: EvsysPolicyConfig, builder: Builder) -> AsyncIterator[LLMProviderInfo]:
    """The LLM under training."""
    from nat_plugin_evsys.policy.policy import Policy

    Policy.of(config).configured_by(builder)
    yield LLMProviderInfo(config=config, description="A policy that `nat finetune` trains and `nat run` serves.")


@register_llm_client(config_type=EvsysPolicyConfig, wrapper_type=LLMFrameworkEnum.LANGCHAIN)
async def evsys_policy_langchain(config: EvsysPolicyConfig, _builder: Builder) -> "AsyncIterator[ChatOpenAI]":
    """An ordinary ChatOpenAI bound to the policy's endpoint."""
    from nat_plugin_evsys.policy.policy import Policy

    policy = Policy.of(config)
    policy.check_servable()
    async with policy.langchain_client() as client:
        yield client


def _register_client_of(framework: LLMFrameworkEnum) -> None:
    @register_llm_client(config_type=EvsysPolicyConfig, wrapper_type=framework)
    async def evsys_policy_client(config: EvsysPolicyConfig, _builder: Builder) -> AsyncIterator[Any]:
        from nat_plugin_evsys.policy.policy import Policy

        policy = Policy.of(config)
        policy.check_servable()
        async with policy.framework_client(framework) as client:
            yield client


for _framework in CLIENTS:
    _register_client_of(_framework)


@register_evaluator(config_type=EvsysExactMatchConfig)
async def evsys_exact_match(config: EvsysExactMatchConfig, _builder: EvalBuilder) -> AsyncIterator[EvaluatorInfo]:
    """Output against answer."""
    from nat_plugin_evsys.evaluators.exact_match import ExactMatchEvaluator

    evaluator = ExactMatchEvaluator(config)
    yield EvaluatorInfo(
        config=config,
        evaluate_fn=evaluator.evaluate,  # type: ignore[arg-type]  # NAT awaits it, whatever it declares
        description="Output matches the answer",
    )


@register_evaluator(config_type=EvsysFunctionCallConfig)
async def evsys_function_call(config: EvsysFunctionCallConfig, _builder: EvalBuilder) -> AsyncIterator[EvaluatorInfo]:
    """Function calls against the calls that are accepted."""
    from nat_plugin_evsys.evaluators.function_call import FunctionCallEvaluator

    evaluator = FunctionCallEvaluator(config)
    yield EvaluatorInfo(
        config=config,
        evaluate_fn=evaluator.evaluate,  # type: ignore[arg-type]  # NAT awaits it, whatever it declares
        description="The right functions with accepted arguments",
    )


@register_trajectory_builder(config_type=EvsysTrajectoryBuilderConfig)
async def evsys_trajectory_builder(
    config: EvsysTrajectoryBuilderConfig, builder: Builder
) -> "AsyncIterator[EvsysTrajectoryBuilder]":
    """Rollouts -> trajectory groups."""
    from nat_plugin_evsys.finetuning.telemetry import RunExporters
    from nat_plugin_evsys.finetuning.trajectory_builder import EvsysTrajectoryBuilder

    yield EvsysTrajectoryBuilder(config, RunExporters.of(builder))


@register_trajectory_builder(config_type=EvsysTraceBuilderConfig)
async def evsys_trace_builder(config: EvsysTraceBuilderConfig, builder: Builder) -> "AsyncIterator[EvsysTraceBuilder]":
    """Recorded trajectories -> trajectory groups."""
    from nat_plugin_evsys.finetuning.telemetry import RunExporters
    from nat_plugin_evsys.finetuning.traces.builder import EvsysTraceBuilder

    yield EvsysTraceBuilder(config, RunExporters.of(builder))


@register_trainer_adapter(config_type=EvsysTrainerAdapterConfig)
async def evsys_trainer_adapter(
    config: EvsysTrainerAdapterConfig, builder: Builder
) -> "AsyncIterator[EvsysTrainerAdapter]":
    """Trajectory groups -> training jobs."""
    from nat_plugin_evsys.finetuning.trainer_adapter import EvsysTrainerAdapter
    from nat_plugin_evsys.policy.policy import Policy

    yield EvsysTrainerAdapter(config, Policy.named(config.policy, builder))


@register_trainer(config_type=EvsysTrainerConfig)
async def evsys_trainer(config: EvsysTrainerConfig, builder: Builder) -> "AsyncIterator[EvsysTrainer]":
    """The epochs."""
    from nat_plugin_evsys.finetuning.trainer import EvsysTrainer, more_adapters

    yield EvsysTrainer(config, await more_adapters(config, builder))
