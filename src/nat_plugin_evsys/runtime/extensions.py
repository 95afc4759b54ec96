"""This package's extensions of Tinker's types: subclasses, so that code written for Tinker takes them."""

from __future__ import annotations

from typing import Any

from pydantic import ConfigDict
from tinker import types


class SamplingParams(types.SamplingParams):
    """Tinker's sampling parameters, and vLLM's others; an unknown field is an error, not ignored.

    ``top_k`` is off at -1 and, as in Weaver, at 0. The returned logprobs are those of the distribution that results.
    ``min_tokens`` and bans say what may be sampled: with one of them, as with a grammar, the logprobs are the policy's
    own, those of the temperature alone. ``engine.sampling.shaping`` has the formulas and their order.
    """

    model_config = ConfigDict(extra="forbid")

    repetition_penalty: float = 1.0
    """Divides (multiplies, where negative) the logits of tokens seen in the prompt or the sequence; 1 is off."""

    frequency_penalty: float = 0.0
    """Lowers a token's logit by this for each time that it was sampled."""

    presence_penalty: float = 0.0
    """Lowers a token's logit by this once it was sampled."""

    min_p: float = 0.0
    """Drops tokens with less than this share of the likeliest token's probability."""

    min_tokens: int = 0
    """No token ends a sequence before this many were sampled."""

    logit_bias: dict[int, float] | None = None
    """Is added to the logits of token ids; -100 bans one."""


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
