"""Checks a list of ``tinker.Datum`` before any compute and turns it into tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nat_plugin_evsys.engine.gradient.losses import LOSSES
from nat_plugin_evsys.engine.model.images import NoImages, PlacedImage, ReadsImages, read_model_input
from nat_plugin_evsys.errors import DataError

if TYPE_CHECKING:
    import tinker


TEMPERATURE = "temperature"
"""Input of every loss: what the logits of each position are divided by, (N,). *Extension* of Tinker."""


@dataclass(frozen=True, eq=False)
class Example:
    """A checked Datum: everything on the CPU, int64 and float32.

    Attributes:
        tokens: (N,) what the model reads.
        targets: (N,) or (N, K) what each position predicts.
        inputs: the loss function's other inputs; (N,) each, ``weights`` in the shape of ``targets``.
        temperature: (N,) that divides the logits of each position, or None for 1 everywhere. *Extension* of Tinker.
        images: what the placeholders among ``tokens`` stand for.
    """

    tokens: Tensor
    targets: Tensor
    inputs: dict[str, Tensor]
    temperature: Tensor | None = None
    images: tuple[PlacedImage, ...] = ()

    def __len__(self) -> int:
        return len(self.tokens)


def check_loss_fn(loss_fn: str) -> None:
    """Raises DataError unless the engine has a loss of that name."""
    if loss_fn in LOSSES:
        return
    why = {
        "stable_reinforce": "its formula is not public",
        "custom": "pass the Python function to forward_backward_custom",
    }.get(str(loss_fn), "it is unknown")
    raise DataError(f"loss_fn {loss_fn!r} cannot be used: {why}; choose one of {', '.join(LOSSES)}")


def check_datums(
    data: Sequence[tinker.Datum],
    loss_fn: str,
    *,
    vocab_size: int,
    context_length: int,
    vision: ReadsImages | NoImages,
) -> list[Example]:
    """The Datums as tensors; missing ``weights`` of cross_entropy become 1.

    Raises:
        DataError: names the Datum's index, what was seen and what is expected.
    """
    check_loss_fn(loss_fn)
    if not data:
        raise DataError("data is an empty list; give at least one Datum")
    spec = LOSSES[loss_fn]
    examples = []
    for index, datum in enumerate(data):
        where = f"data[{index}]"
        tokens, images = _model_input(datum, where, vocab_size, context_length, vision)
        inputs = _loss_inputs(datum, where, loss_fn, spec.required, spec.optional)
        targets = _targets(inputs.pop("target_tokens"), where, len(tokens), vocab_size)
        if loss_fn != "cross_entropy" and targets.dim() != 1:
            raise DataError(f"{where}: {loss_fn} takes target_tokens of shape ({len(tokens)},), got {_shape(targets)}")
        if loss_fn == "cross_entropy":
            inputs.setdefault("weights", torch.ones(targets.shape))
        for key, value in inputs.items():
            shape = targets.shape[:1] if key == TEMPERATURE else targets.shape
            inputs[key] = _floats(value, where, key, shape)
        _fold_mask(inputs, where)
        _check_gspo(inputs, where, loss_fn)
        temperature = _temperature(inputs.pop(TEMPERATURE, None), where)
        examples.append(Example(tokens, targets, inputs, temperature, images))
    return examples


def _model_input(
    datum: Any, where: str, vocab_size: int, context_length: int, vision: ReadsImages | NoImages
) -> tuple[Tensor, tuple[PlacedImage, ...]]:
    if not hasattr(datum, "model_input") or not hasattr(datum, "loss_fn_inputs"):
        raise DataError(f"{where} is a {type(datum).__name__}; give a tinker.Datum(model_input=…, loss_fn_inputs=…)")
    text_only = "the engine takes text tokens only"
    ids, images = read_model_input(datum.model_input.chunks, vision, f"{where}: model_input", text_only)
    if not ids:
        raise DataError(f"{where}: model_input is empty; it needs at least one token")
    if len(ids) > context_length:
        raise DataError(
            f"{where}: model_input has {len(ids)} tokens, but the model's context length is {context_length}; "
            "shorten it or raise context_length"
        )
    tokens = torch.tensor(ids, dtype=torch.int64)
    _check_vocabulary(tokens, where, "model_input", vocab_size)
    return tokens, images


def _loss_inputs(
    datum: tinker.Datum, where: str, loss_fn: str, required: tuple[str, ...], optional: tuple[str, ...]
) -> dict[str, Tensor]:
    given: Mapping[str, Any] = datum.loss_fn_inputs
    required = ("target_tokens", *required)
    for key in required:
        if key not in given:
            raise DataError(f"{where}: loss_fn_inputs lacks {key!r}; {loss_fn} needs {', '.join(required)}")
    for key in given:
        if key not in required and key not in optional and key != TEMPERATURE:
            takes = ", ".join((*required, *optional))
            raise DataError(f"{where}: loss_fn_inputs has {key!r}, which {loss_fn} does not take; it takes {takes}")
    return {key: value.to_torch() for key, value in given.items()}


def _targets(targets: Tensor, where: str, length: int, vocab_size: int) -> Tensor:
    if targets.dtype != torch.int64:
        raise DataError(f"{where}: target_tokens are {_dtype(targets)}; give int64 token ids")
    if targets.dim() not in (1, 2) or targets.shape[0] != length or targets.numel() == 0:
        raise DataError(
            f"{where}: target_tokens have shape {_shape(targets)}; model_input has {length} tokens, so ({length},) or "
            f"({length}, K) is expected"
        )
    _check_vocabulary(targets, where, "target_tokens", vocab_size)
    return targets


def _floats(value: Tensor, where: str, key: str, shape: torch.Size) -> Tensor:
    if value.shape != shape:
        raise DataError(f"{where}: {key} has shape {_shape(value)}; with these target_tokens it must be {tuple(shape)}")
    value = value.to(torch.float32)
    bad = (~torch.isfinite(value)).nonzero()
    if len(bad):
        at = ", ".join(str(i) for i in bad[0].tolist())
        raise DataError(f"{where}: {key}[{at}] is {value[tuple(bad[0])].item()}; every value must be finite")
    return value


def _temperature(value: Tensor | None, where: str) -> Tensor | None:
    if value is None or bool((value == 1).all()):
        return None
    if bool((value <= 0).any()):
        at = int((value <= 0).nonzero()[0])
        raise DataError(
            f"{where}: {TEMPERATURE}[{at}] is {value[at].item()}; give the temperature above 0 it was sampled at"
        )
    return value


def _check_vocabulary(ids: Tensor, where: str, key: str, vocab_size: int) -> None:
    bad = ((ids < 0) | (ids >= vocab_size)).nonzero()
    if len(bad):
        at = ", ".join(str(i) for i in bad[0].tolist())
        raise DataError(f"{where}: {key}[{at}] is {int(ids[tuple(bad[0])])}; token ids are 0 to {vocab_size - 1}")


def _fold_mask(inputs: dict[str, Tensor], where: str) -> None:
    """Multiply the advantages by ``mask``, if there is one: the losses that take it are linear in them."""
    mask = inputs.pop("mask", None)
    if mask is None:
        return
    if bool((mask < 0).any()):
        at = int((mask < 0).nonzero()[0])
        raise DataError(f"{where}: mask[{at}] is {mask[at].item()}; give 1 for a token that counts and 0 for another")
    inputs["advantages"] = inputs["advantages"] * mask


def _check_gspo(inputs: Mapping[str, Tensor], where: str, loss_fn: str) -> None:
    if loss_fn != "gspo" or not bool((inputs["advantages"] != 0).any()):
        return
    if not bool((inputs["sequence_ratio_mask"] != 0).any()):
        raise DataError(f"{where}: sequence_ratio_mask is zero everywhere; mark the sampled tokens with 1")


def check_thresholds(examples: Sequence[Example], config: Mapping[str, float]) -> None:
    """Check per-token thresholds against each other, or against the config's if only one of the two is per token.

    Raises:
        DataError: a threshold is negative, or the low one is above the high one.
    """
    keys = ("clip_low_threshold", "clip_high_threshold")
    for index, example in enumerate(examples):
        for key in keys:
            if key in example.inputs and bool((example.inputs[key] < 0).any()):
                at = int((example.inputs[key] < 0).nonzero()[0])
                raise DataError(
                    f"data[{index}]: {key}[{at}] is {example.inputs[key][at].item()}; a ratio is never below 0"
                )
        if not any(key in example.inputs for key in keys):
            continue
        low, high = (torch.as_tensor(example.inputs.get(key, config[key])).expand(len(example)) for key in keys)
        if bool((low > high).any()):
            at = int((low > high).nonzero()[0])
            raise DataError(
                f"data[{index}]: clip_low_threshold {low[at].item():g} is above clip_high_threshold "
                f"{high[at].item():g} at {at}"
            )


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
