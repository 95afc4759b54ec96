"""The JSON bodies of the operations, as the protocol names their fields. Unknown fields of a newer SDK are ignored.

Not the SDK's own request types: those refuse unknown fields and change with the version that is installed.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, field_validator
from tinker import types

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

    rank: int = Field(default=defaults.RANK, ge=1, le=MAX_RANK)
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


class TextChunk(RequestBody):
    """A part of a prompt; only ``encoded_text`` has tokens."""

    type: str = "encoded_text"
    tokens: list[int] | None = Field(default=None, fail_fast=True)


class Prompt(RequestBody):
    """``ModelInput``."""

    chunks: list[TextChunk] = Field(fail_fast=True)

    def tokens(self) -> list[int]:
        """The token ids.

        Raises:
            UnsupportedError: a chunk that is not text.
        """
        for chunk in self.chunks:
            if chunk.type != "encoded_text" or chunk.tokens is None:
                raise UnsupportedError(
                    f"a prompt chunk of type {chunk.type!r} is not offered: only encoded_text is; send token ids"
                )
        return [token for chunk in self.chunks for token in chunk.tokens or ()]


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
