"""The YAML types. Importing this package loads no torch, no transformers and no art."""

from nat_plugin_evsys.config.evaluator import EvsysExactMatchConfig, EvsysFunctionCallConfig
from nat_plugin_evsys.config.finetuning import (
    EvsysTrainerAdapterConfig,
    EvsysTrainerConfig,
    EvsysTrajectoryBuilderConfig,
    WarmStartConfig,
)
from nat_plugin_evsys.config.policy import EvsysPolicyConfig
from nat_plugin_evsys.config.traces import EvsysTraceBuilderConfig

__all__ = [
    "EvsysExactMatchConfig",
    "EvsysFunctionCallConfig",
    "EvsysPolicyConfig",
    "EvsysTraceBuilderConfig",
    "EvsysTrainerAdapterConfig",
    "EvsysTrainerConfig",
    "EvsysTrajectoryBuilderConfig",
    "WarmStartConfig",
]
