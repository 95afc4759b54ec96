"""The YAML types. Importing this package loads no torch, no transformers and no art."""

from .evaluator import EvsysExactMatchConfig
from .finetuning import EvsysTrainerAdapterConfig, EvsysTrainerConfig, EvsysTrajectoryBuilderConfig, WarmStartConfig
from .policy import EvsysPolicyConfig

__all__ = [
    "EvsysExactMatchConfig",
    "EvsysPolicyConfig",
    "EvsysTrainerAdapterConfig",
    "EvsysTrainerConfig",
    "EvsysTrajectoryBuilderConfig",
    "WarmStartConfig",
]
