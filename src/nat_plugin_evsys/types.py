"""The types of the training API: those of ``tinker.types`` and this package's extensions of them.

Nothing is imported until a name is asked for, so that ``import nat_plugin_evsys.types`` stays light. Any other name of
``tinker.types`` (those of its HTTP requests) is found here too.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinker.lib.retry_handler import RetryConfig as RetryConfig
    from tinker.types import AdamOptimizerConfig as AdamOptimizerConfig
    from tinker.types import AdamParams as AdamParams
    from tinker.types import Checkpoint as Checkpoint
    from tinker.types import CheckpointsListResponse as CheckpointsListResponse
    from tinker.types import Cursor as Cursor
    from tinker.types import EncodedTextChunk as EncodedTextChunk
    from tinker.types import GetInfoResponse as GetInfoResponse
    from tinker.types import GetInfoResponse as InitTrainerServerResponse
    from tinker.types import GetServerCapabilitiesResponse as GetServerCapabilitiesResponse
    from tinker.types import GetServerCapabilitiesResponse as ServerCapabilities
    from tinker.types import LoadWeightsResponse as LoadWeightsResponse
    from tinker.types import LoraConfig as LoraConfig
    from tinker.types import LossFnInputs as LossFnInputs
    from tinker.types import LossFnOutput as LossFnOutput
    from tinker.types import LossFnType as LossFnType
    from tinker.types import ModelID as ModelID
    from tinker.types import ModelInput as ModelInput
    from tinker.types import ModelInputChunk as ModelInputChunk
    from tinker.types import OptimStepResponse as OptimStepResponse
    from tinker.types import SampleResponse as SampleResponse
    from tinker.types import SaveWeightsForSamplerResponse as SaveWeightsForSamplerResponse
    from tinker.types import SaveWeightsResponse as SaveWeightsResponse
    from tinker.types import TensorData as TensorData
    from tinker.types import TrainingRun as TrainingRun
    from tinker.types import TrainingRunsResponse as TrainingRunsResponse
    from tinker.types import WeightsInfoResponse as WeightsInfoResponse

    from nat_plugin_evsys.clients.futures import ClientFuture as ClientFuture
    from nat_plugin_evsys.clients.futures import ForwardBackwardFuture as ForwardBackwardFuture
    from nat_plugin_evsys.clients.futures import ResultFuture as ResultFuture
    from nat_plugin_evsys.clients.loops import CheckpointFile as CheckpointFile
    from nat_plugin_evsys.clients.loops import CheckpointFilesResponse as CheckpointFilesResponse
    from nat_plugin_evsys.clients.loops import WandbConfig as WandbConfig
    from nat_plugin_evsys.clients.results import ForwardBackwardOutput as ForwardBackwardOutput
    from nat_plugin_evsys.engine.gradient.operations import OperationFuture as OperationFuture
    from nat_plugin_evsys.engine.sampling.result import SampledSequence as SampledSequence
    from nat_plugin_evsys.engine.sampling.result import SampleResult as SampleResult
    from nat_plugin_evsys.runtime.extensions import Datum as Datum
    from nat_plugin_evsys.runtime.extensions import ModelData as ModelData
    from nat_plugin_evsys.runtime.extensions import SamplingParams as SamplingParams
    from nat_plugin_evsys.runtime.extensions import SupportedModel as SupportedModel

_TINKER = "tinker.types"
_MODULES = {
    "CheckpointFile": "nat_plugin_evsys.clients.loops",
    "CheckpointFilesResponse": "nat_plugin_evsys.clients.loops",
    "WandbConfig": "nat_plugin_evsys.clients.loops",
    "RetryConfig": "tinker.lib.retry_handler",
    "ClientFuture": "nat_plugin_evsys.clients.futures",
    "ForwardBackwardFuture": "nat_plugin_evsys.clients.futures",
    "ResultFuture": "nat_plugin_evsys.clients.futures",
    "ForwardBackwardOutput": "nat_plugin_evsys.clients.results",
    "OperationFuture": "nat_plugin_evsys.engine.gradient.operations",
    "SampledSequence": "nat_plugin_evsys.engine.sampling.result",
    "SampleResult": "nat_plugin_evsys.engine.sampling.result",
    "Datum": "nat_plugin_evsys.runtime.extensions",
    "ModelData": "nat_plugin_evsys.runtime.extensions",
    "SamplingParams": "nat_plugin_evsys.runtime.extensions",
    "SupportedModel": "nat_plugin_evsys.runtime.extensions",
}
"""Where the types that are not in ``tinker.types`` are defined."""

__all__ = [
    "AdamOptimizerConfig",
    "AdamParams",
    "Checkpoint",
    "CheckpointFile",
    "CheckpointFilesResponse",
    "CheckpointsListResponse",
    "ClientFuture",
    "Cursor",
    "Datum",
    "EncodedTextChunk",
    "ForwardBackwardFuture",
    "ForwardBackwardOutput",
    "GetInfoResponse",
    "GetServerCapabilitiesResponse",
    "InitTrainerServerResponse",
    "LoadWeightsResponse",
    "LoraConfig",
    "LossFnInputs",
    "LossFnOutput",
    "LossFnType",
    "ModelData",
    "ModelID",
    "ModelInput",
    "ModelInputChunk",
    "OperationFuture",
    "OptimStepResponse",
    "ResultFuture",
    "RetryConfig",
    "SampleResponse",
    "SampleResult",
    "SampledSequence",
    "SamplingParams",
    "SaveWeightsForSamplerResponse",
    "SaveWeightsResponse",
    "ServerCapabilities",
    "SupportedModel",
    "TensorData",
    "TrainingRun",
    "TrainingRunsResponse",
    "WandbConfig",
    "WeightsInfoResponse",
]

_ALIASES = {
    "ServerCapabilities": "GetServerCapabilitiesResponse",
    "InitTrainerServerResponse": "GetInfoResponse",
}
"""Names of other APIs for Tinker's types."""


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES.get(name, _TINKER)), _ALIASES.get(name, name))
