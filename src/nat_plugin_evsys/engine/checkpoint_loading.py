"""Loads checkpoints, own and foreign ones, into models and for sampling. Everything is checked before a change."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from nat_plugin_evsys.engine.checkpoints import OPTIMIZER, CheckpointInfo, read_checkpoint
from nat_plugin_evsys.engine.gradient.trainable import TrainableModel
from nat_plugin_evsys.engine.model.loading import BaseModel
from nat_plugin_evsys.engine.model.lora import LoraAdapter, linear_shape
from nat_plugin_evsys.engine.model.peft_format import ADAPTER, from_peft_names
from nat_plugin_evsys.engine.model.targets import linear_roles
from nat_plugin_evsys.errors import CheckpointError


def load_checkpoint(path: Path | str, model: TrainableModel, *, with_optimizer: bool) -> CheckpointInfo:
    """Load a checkpoint's weights (and moments; without them the optimizer starts afresh) into ``model``.

    Everything is checked before anything is changed. An accumulated gradient is dropped.

    Raises:
        CheckpointError: missing, torn, made for another base model or LoRA shape, or without the optimizer asked for.
    """
    info = read_checkpoint(path)
    check_base(info, model.base)
    _check_lora_shape(info, model.adapter)
    if with_optimizer and info.kind != "training":
        raise CheckpointError(
            f"checkpoint {info.path} has no {OPTIMIZER}: it was saved for sampling; load it without the optimizer"
        )
    weights = from_peft_names(_load_tensors(info.path / ADAPTER), info.targets, info.path)
    state = _load_tensors(info.path / OPTIMIZER) if with_optimizer else {}
    _check_shapes(weights, model.parameters, info.path / ADAPTER)
    if state:
        for moment in ("exp_avg", "exp_avg_sq"):
            expected = {f"{name}.{moment}": parameter for name, parameter in model.parameters.items()}
            _check_shapes(state, expected, info.path / OPTIMIZER)
    with torch.no_grad():
        for name, parameter in model.parameters.items():
            parameter.copy_(weights[name])
    model.optimizer.load_state_tensors(state)
    model.discard_gradient()
    model.step = info.step
    return info


def start_from(path: Path | str, model: TrainableModel) -> CheckpointInfo:
    """Let ``model`` start from a checkpoint's weights, with a fresh optimizer.

    Its adapter may have a higher rank, another alpha, and more modules than the checkpoint's: it computes what that
    does, and what it has in addition starts as LoRA does, with B zero.

    Raises:
        CheckpointError: missing, torn, made for another base model, or larger than the adapter. Nothing has changed.
    """
    info, weights = _weights(path, model.base)
    adapter = model.adapter
    missing = sorted(set(info.targets) - set(adapter.weights))
    if missing or info.rank > adapter.rank:
        raise CheckpointError(
            f"checkpoint {info.path} has LoRA rank {info.rank} and {len(info.targets)} modules"
            + (f", {missing[0]} among them" if missing else "")
            + f"; this model has rank {adapter.rank} and {len(adapter.weights)} modules; raise its rank, or train the "
            "modules too"
        )
    scale = (info.alpha / info.rank) / adapter.scale
    with torch.no_grad():
        for name in info.targets:
            a, b = adapter.weights[name]
            a[: info.rank].copy_(weights[f"{name}.lora_A.weight"])
            b.zero_()[:, : info.rank].copy_(weights[f"{name}.lora_B.weight"] * scale)
        for name in set(adapter.weights) - set(info.targets):
            adapter.weights[name][1].zero_()
    model.optimizer.load_state_tensors({})
    model.discard_gradient()
    model.step = info.step
    return info


def load_adapter(path: Path | str, base: BaseModel, *, like: LoraAdapter | None = None) -> LoraAdapter:
    """A frozen adapter for sampling, with the LoRA shape of ``like``, or any shape; a foreign one with its own.

    Raises:
        CheckpointError: missing, torn, or made for another base model or LoRA shape.
    """
    info, tensors = _weights(path, base)
    if like is not None and not info.is_foreign:
        _check_lora_shape(info, like)

    def on_device(name: str, side: str) -> Tensor:
        return tensors[f"{name}.lora_{side}.weight"].to(base.model.get_parameter(f"{name}.weight").device)

    weights = {name: (on_device(name, "A"), on_device(name, "B")) for name in info.targets}
    return LoraAdapter(info.rank, info.alpha, weights)


def check_base(info: CheckpointInfo, base: BaseModel) -> None:
    """Raises CheckpointError unless the checkpoint was made for this base model, as far as its manifest says."""
    if info.is_foreign:
        return
    differing = [
        key for key in info.base_identity | base.identity if info.base_identity.get(key) != base.identity.get(key)
    ]
    if differing:
        seen = ", ".join(f"{key} {info.base_identity.get(key)} / {base.identity.get(key)}" for key in differing[:2])
        rounded = " (weights that float16 rounds have another fingerprint: load them in the dtype it was trained in)"
        raise CheckpointError(
            f"checkpoint {info.path} was made for another base model ({info.base_model}); checkpoint / loaded: {seen}"
            f"{rounded if differing == ['weights_sha256'] else ''}"
        )


def _weights(path: Path | str, base: BaseModel) -> tuple[CheckpointInfo, dict[str, Tensor]]:
    """A checkpoint's matrices by ``<module>.lora_<A or B>.weight``, after it was seen to fit the base model.

    Raises:
        CheckpointError: missing, torn, or made for another base model.
    """
    info = read_checkpoint(path)
    check_base(info, base)
    tensors = from_peft_names(_load_tensors(info.path / ADAPTER), info.targets, info.path)
    known = linear_roles(base.model)
    for name in info.targets:
        if name not in known:
            raise CheckpointError(f"checkpoint {info.path} adapts {name}, which {base.name} does not have or train")
        outputs, inputs = linear_shape(base.model.get_submodule(name))
        shapes = {"A": (info.rank, inputs), "B": (outputs, info.rank)}
        for side, expected in shapes.items():
            if (found := tuple(tensors[f"{name}.lora_{side}.weight"].shape)) != expected:
                raise CheckpointError(
                    f"checkpoint {info.path}: {name}.lora_{side} has shape {found}, but {base.name} needs {expected}"
                )
    return info, tensors


def _check_lora_shape(info: CheckpointInfo, adapter: LoraAdapter) -> None:
    here = (adapter.rank, adapter.alpha, sorted(adapter.weights))
    if (info.rank, info.alpha, sorted(info.targets)) != here:
        raise CheckpointError(
            f"checkpoint {info.path} has LoRA rank {info.rank}, alpha {info.alpha:g}, {len(info.targets)} modules; "
            f"this model has rank {adapter.rank}, alpha {adapter.alpha:g}, {len(adapter.weights)} modules; create "
            "it with the checkpoint's shape"
        )


def _check_shapes(tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor], file: Path) -> None:
    for name, parameter in parameters.items():
        if name not in tensors or tensors[name].shape != parameter.shape:
            found = tuple(tensors[name].shape) if name in tensors else "nothing"
            raise CheckpointError(f"{file}: {name} has shape {found}, expected {tuple(parameter.shape)}")


def _load_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as exc:
        raise CheckpointError(f"{file} cannot be read: {exc}") from exc
