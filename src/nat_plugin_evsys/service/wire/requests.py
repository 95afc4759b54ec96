"""The JSON bodies of the operations, as the protocol names their fields. Unknown fields of a newer SDK are ignored.

Not the SDK's own request types: those refuse unknown fields and change with the version that is installed.
"""

from __future__ import annotations

import base64
from typing import Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, field_validator
from tinker import types

from nat_plugin_evsys.engine.model.images import IMAGE_FORMATS
from nat_plugin_evsys.errors import DataError, UnsupportedError
from nat_plugin_evsys.runtime import defaults
from nat_plugin_evsys.runtime.arguments import check_metadata

MAX_RANK = 1024
MAX_STOPS = 1024
_INT64 = 2**63


class RequestBody(BaseModel):
    """Base of all bodies."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())


class OptimizerChoice(RequestBody):
    """``optimizer_config``."""

    type: str = "adamw"


class LoraChoice(RequestBody):
    """``lora_config``."""

    rank: int = Field(default=defaults.RANK, ge=0, le=MAX_RANK)
    seed: int | None = Field(default=None, ge=-_INT64, lt=_INT64)
    train_unembed: bool = defaults.TINKER_TRAIN_UNEMBED
    train_mlp: bool = defaults.TRAIN_MLP
    train_attn: bool = defaults.TRAIN_ATTN


class CreateModel(RequestBody):
    """``create_model``."""

    session_id: str
    model_seq_id: int = Field(ge=0, lt=_INT64)
    base_model: str
    lora_config: LoraChoice | None = None
    optimizer_config: OptimizerChoice | None = None
    user_metadata: dict[str, Any] | None = None


class AdamChoice(RequestBody):
    """``adam_params``; another optimizer's parameters have another ``type``."""

    type: str = "adamw"
    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0

    def params(self) -> types.AdamParams:
        """Tinker's type.

        Raises:
            UnsupportedError: another optimizer than AdamW.
        """
        check_adamw(self.type)
        return types.AdamParams(**self.model_dump(exclude={"type"}))


class OptimStep(RequestBody):
    """``optim_step``."""

    params: AdamChoice = Field(validation_alias=AliasChoices("adam_params", "optimizer_params", "optim_params"))


class SaveWeights(RequestBody):
    """``save_weights``, ``save_weights_for_sampler`` and ``save_weights_external``."""

    path: str | None = None
    ttl_seconds: int | None = None
    overwrite: bool = False
    user_metadata: dict[str, Any] | None = None
    sampling_session_seq_id: int | None = Field(default=None, ge=0, lt=_INT64)
    kind: str = "snapshot"
    age_encryption_recipients: list[str] | None = None


class LoadWeights(RequestBody):
    """``load_weights``: of an existing model, or, with ``session_id``, of a new one."""

    path: str
    optimizer: bool
    session_id: str | None = None
    model_seq_id: int | None = Field(default=None, ge=0, lt=_INT64)
    base_model: str | None = None
    user_metadata: dict[str, Any] | None = None
    optimizer_config: OptimizerChoice | None = None
    weights_access_token: str | None = None


class PromptChunk(RequestBody):
    """A part of a prompt: ``encoded_text`` has tokens, ``image`` a file in base64."""

    type: str = "encoded_text"
    tokens: list[int] | None = Field(default=None, fail_fast=True)
    data: str | None = None
    format: str | None = None
    expected_tokens: int | None = None

    def chunk(self) -> types.EncodedTextChunk | types.ImageChunk:
        """Tinker's type; the engine decodes an image.

        Raises:
            UnsupportedError: another chunk than text or an image, or one without its content.
            DataError: an image's data are not base64, or its format is neither png nor jpeg.
        """
        if self.type == "encoded_text" and self.tokens is not None:
            return types.EncodedTextChunk.model_construct(tokens=self.tokens, type="encoded_text")
        if self.type != "image" or not self.data:
            raise UnsupportedError(
                f"a prompt chunk of type {self.type!r} is not offered: only encoded_text with its tokens, and image "
                "with its data in base64, are; nothing is fetched"
            )
        if self.format not in IMAGE_FORMATS:
            raise DataError(f"an image of the prompt has the format {self.format!r}; send png or jpeg")
        try:
            file = base64.b64decode(self.data, validate=True)
        except ValueError as error:
            raise DataError(f"an image of the prompt is not base64: {error}") from error
        form: Any = self.format
        return types.ImageChunk(data=file, format=form, expected_tokens=self.expected_tokens)


class Prompt(RequestBody):
    """``ModelInput``."""

    chunks: list[PromptChunk] = Field(fail_fast=True)

    def model_input(self) -> types.ModelInput:
        """Tinker's type; raises what ``PromptChunk.chunk`` does."""
        return types.ModelInput.model_construct(chunks=[chunk.chunk() for chunk in self.chunks])


class Sampling(RequestBody):
    """``SamplingParams``."""

    max_tokens: int | None = None
    seed: int | None = Field(default=None, ge=-_INT64, lt=_INT64)
    stop: str | list[str] | list[int] | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0

    @field_validator("stop", mode="before")
    @classmethod
    def _few_stops(cls, stop: Any) -> Any:
        if isinstance(stop, list) and len(stop) > MAX_STOPS:
            raise ValueError(f"{len(stop)} stop entries; at most {MAX_STOPS} are taken")
        return stop

    def params(self) -> types.SamplingParams:
        """Tinker's type."""
        return types.SamplingParams(**self.model_dump())


class TargetIds(RequestBody):
    """``target_prompt_logprobs``: token ids, dense or sparse CSR."""

    data: list[int]
    dtype: Literal["int64"] = "int64"
    shape: list[int] | None = None
    sparse_crow_indices: list[int] | None = None
    sparse_col_indices: list[int] | None = None

    def tensor(self) -> types.TensorData:
        """Tinker's type.

        Raises:
            DataError: shape and data do not fit.
        """
        try:
            return types.TensorData(**self.model_dump())
        except (ValueError, TypeError, OverflowError) as error:
            raise DataError(f"target_prompt_logprobs is malformed: {error}") from error


class Sample(RequestBody):
    """``asample``."""

    prompt: Prompt
    sampling_params: Sampling = Sampling()
    num_samples: int = Field(default=1, ge=1, le=4096)
    prompt_logprobs: bool | None = None
    topk_prompt_logprobs: int = Field(default=0, ge=0)
    topk_sample_logprobs: int = Field(default=0, ge=0)
    target_prompt_logprobs: TargetIds | None = None
    prompt_alt_tokens_k: int = Field(default=0, ge=0)
    prompt_logprobs_last_n: int | None = None
    record_stability_info: bool | None = None

    def targets(self) -> types.TensorData | None:
        """``target_prompt_logprobs`` in Tinker's type.

        Raises:
            DataError: shape and data do not fit.
        """
        return None if self.target_prompt_logprobs is None else self.target_prompt_logprobs.tensor()


def check_adamw(kind: str) -> None:
    """Raises UnsupportedError for another optimizer."""
    if kind not in ("adamw", "adam"):
        raise UnsupportedError(f"optimizer {kind!r} is not offered: AdamW is the only one; leave it out")


def metadata_of(given: dict[str, Any] | None) -> dict[str, str]:
    """Metadata, from text to text.

    Raises:
        ConfigError: it is something else.
    """
    return check_metadata(given)
