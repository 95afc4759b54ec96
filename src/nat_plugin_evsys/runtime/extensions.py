"""This package's extensions of Tinker's types: subclasses, so that code written for Tinker takes them."""

from __future__ import annotations

from typing import Any

from pydantic import ConfigDict
from tinker import types


class SamplingParams(types.SamplingParams):
    """Tinker's sampling parameters, plus ``repetition_penalty``; an unknown field is an error, not ignored.

    ``top_k`` is off at -1 and, as in Weaver, at 0.
    """

    model_config = ConfigDict(extra="forbid")

    repetition_penalty: float = 1.0
    """Divides (multiplies, where negative) the logits of tokens seen in the prompt or the sequence; 1 is off.
    The returned logprobs are those of the distribution that results."""


class Datum(types.Datum):
    """Tinker's Datum, whose ``loss_fn_inputs`` may also hold a ModelInput (as in Tinker's own examples)."""

    def __post_init__(self) -> None:
        plain: dict[str, Any] = {
            key: value.to_ints() if isinstance(value, types.ModelInput) else value
            for key, value in self.loss_fn_inputs.items()
        }
        object.__setattr__(self, "loss_fn_inputs", plain)
        super().__post_init__()


class ModelData(types.ModelData):
    """Tinker's ModelData, plus the two fields that its example of ``get_info`` prints."""

    model_config = ConfigDict(protected_namespaces=())

    model_id: str | None = None
    lora_rank: int | None = None


class SupportedModel(types.SupportedModel):
    """Tinker's SupportedModel, plus where the model runs (Loops: "on which GPU classes")."""

    model_config = ConfigDict(protected_namespaces=())

    device: str | None = None
    """Torch device, or None while the model is not loaded."""

    dtype: str | None = None
    """``float32``, ``bfloat16`` or ``float16``, or None while the model is not loaded."""
