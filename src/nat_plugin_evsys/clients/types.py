"""``tinker.types`` and this package's extensions of them. Whoever asks for ``nat_plugin_evsys.types`` gets these.

Any other name of ``tinker.types`` (those of its HTTP requests) is found here too.
"""

from __future__ import annotations

from typing import Any

from tinker import types as _tinker
from tinker.types import AdamOptimizerConfig as AdamOptimizerConfig
from tinker.types import AdamParams as AdamParams
from tinker.types import Checkpoint as Checkpoint
from tinker.types import CheckpointsListResponse as CheckpointsListResponse
from tinker.types import Cursor as Cursor
from tinker.types import EncodedTextChunk as EncodedTextChunk
from tinker.types import GetInfoResponse as GetInfoResponse
from tinker.types import GetServerCapabilitiesResponse as GetServerCapabilitiesResponse
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

from nat_plugin_evsys.clients.extensions import Datum as Datum
from nat_plugin_evsys.clients.extensions import ModelData as ModelData
from nat_plugin_evsys.clients.extensions import SamplingParams as SamplingParams
from nat_plugin_evsys.clients.extensions import SupportedModel as SupportedModel
from nat_plugin_evsys.clients.futures import ClientFuture as ClientFuture
from nat_plugin_evsys.clients.futures import ForwardBackwardFuture as ForwardBackwardFuture
from nat_plugin_evsys.clients.futures import ResultFuture as ResultFuture
from nat_plugin_evsys.clients.results import ForwardBackwardOutput as ForwardBackwardOutput
from nat_plugin_evsys.engine.operations import OperationFuture as OperationFuture
from nat_plugin_evsys.engine.sample_result import SampledSequence as SampledSequence
from nat_plugin_evsys.engine.sample_result import SampleResult as SampleResult

ServerCapabilities = GetServerCapabilitiesResponse
"""Loops' name for Tinker's type."""

REFUSED = {
    "WandbConfig": "every call returns its metrics; hand them to wandb.log where you like",
    "CheckpointFilesResponse": "checkpoints are directories on this machine; see RestClient.get_checkpoint_directory",
    "CheckpointFile": "checkpoints are directories on this machine; see RestClient.get_checkpoint_directory",
    "InitTrainerServerResponse": "no server is started; TrainingClient.get_info() gives a GetInfoResponse",
}
"""Types of the other APIs that are not offered, and why."""


def __getattr__(name: str) -> Any:
    if name in REFUSED:
        raise AttributeError(f"{name} is not offered: {REFUSED[name]}")
    return getattr(_tinker, name)
