"""Checkpoints on disk: a PEFT directory plus, for resuming, the optimizer, and a manifest that proves it whole.

<name>/
  adapter_config.json, adapter_model.safetensors      what ``peft.PeftModel.from_pretrained(base, dir)`` loads
  optimizer.safetensors                               AdamW's moments (kind "training" only)
  manifest.json                                       step, base model identity, LoRA shape, SHA-256 of each file
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nat_plugin_evsys.engine.gradient.trainable import TrainableModel
from nat_plugin_evsys.engine.model.loading import BaseModel
from nat_plugin_evsys.engine.model.lora import LoraAdapter
from nat_plugin_evsys.engine.model.peft_check import say_if_peft_differs
from nat_plugin_evsys.engine.model.peft_format import adapter_config, from_peft_names, to_peft_names
from nat_plugin_evsys.errors import CheckpointError
from nat_plugin_evsys.files import atomic_directory, atomic_write, remove_directory, restore_set_aside

Kind = Literal["sampler", "training", "external"]

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER = "adapter_model.safetensors"
OPTIMIZER = "optimizer.safetensors"

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._=+-]{0,199}")


@dataclass(frozen=True)
class CheckpointInfo:
    """The contents of a manifest.

    Attributes:
        path: the directory.
        kind: ``training`` holds weights and optimizer; ``sampler`` and ``external``, which is to be downloaded, weights
            only.
        step: optimizer steps that made the weights.
        created_at: seconds since the epoch.
        base_model: the name that the base model was loaded by.
        base_identity: ``BaseModel.identity``.
        rank, alpha, targets: the LoRA shape.
        files: file name -> {"sha256", "bytes"}.
        user_metadata: what the caller gave.
        expires_at: seconds since the epoch after which it may be deleted; None is never.
        request_id: the request that saved it, if the caller gave one.
    """

    path: Path
    kind: Kind
    step: int
    created_at: float
    base_model: str
    base_identity: dict[str, Any]
    rank: int
    alpha: float
    targets: list[str]
    files: dict[str, dict[str, Any]]
    user_metadata: dict[str, Any]
    expires_at: float | None = None
    request_id: str | None = None


@dataclass(frozen=True)
class FrozenWeights:
    """Weights for sampling only, and the number of optimizer steps that made them."""

    base: BaseModel
    adapter: LoraAdapter
    step: int


def save_checkpoint(
    directory: Path,
    name: str,
    model: TrainableModel | FrozenWeights,
    *,
    kind: Kind,
    user_metadata: Mapping[str, Any] | None = None,
    expires_at: float | None = None,
    request_id: str | None = None,
) -> Path:
    """Write ``directory/name`` atomically, replacing an existing one of that name; returns its path.

    A gradient that has accumulated but not been stepped on is not part of a checkpoint. Only its owner may read it.

    Raises:
        CheckpointError: the name could leave the directory, the metadata is not JSON, or the disk refused the write.
    """
    try:
        json.dumps(user_metadata, allow_nan=False)
    except (TypeError, ValueError) as exc:
        raise CheckpointError(f"user_metadata of checkpoint {name!r} cannot be written as JSON: {exc}") from exc
    target = checkpoint_path(directory, name)
    adapter, base = model.adapter, model.base
    try:
        with atomic_directory(target, private=True) as work:
            save_file(to_peft_names(adapter), work / ADAPTER, metadata={"format": "pt"})
            (work / ADAPTER_CONFIG).write_text(json.dumps(adapter_config(base, adapter), indent=2) + "\n")
            if kind == "training":
                assert isinstance(model, TrainableModel)
                state = {key: value.cpu().contiguous() for key, value in model.optimizer.state_tensors().items()}
                save_file(state, work / OPTIMIZER)
            manifest = {
                "format_version": FORMAT_VERSION,
                "kind": kind,
                "step": model.step,
                "created_at": time.time(),
                "base_model": base.name,
                "base_identity": base.identity,
                "rank": adapter.rank,
                "alpha": adapter.alpha,
                "targets": list(adapter.weights),
                "files": {p.name: {"sha256": _sha256(p), "bytes": p.stat().st_size} for p in sorted(work.iterdir())},
                "user_metadata": dict(user_metadata or {}),
                "expires_at": expires_at,
            }
            if request_id is not None:
                manifest["request_id"] = request_id
            (work / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    except (OSError, SafetensorError) as exc:  # safetensors has its own error for a full disk
        raise CheckpointError(f"checkpoint {target} could not be written: {exc}") from exc
    say_if_peft_differs(base, adapter)
    return target


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


def load_adapter(path: Path | str, base: BaseModel, *, like: LoraAdapter | None = None) -> LoraAdapter:
    """A frozen adapter for sampling, with the LoRA shape of ``like``, or any shape.

    Raises:
        CheckpointError: missing, torn, or made for another base model or LoRA shape.
    """
    info = read_checkpoint(path)
    check_base(info, base)
    if like is not None:
        _check_lora_shape(info, like)
    tensors = from_peft_names(_load_tensors(info.path / ADAPTER), info.targets, info.path)

    def on_device(name: str, side: str) -> Tensor:
        return tensors[f"{name}.lora_{side}.weight"].to(base.model.get_parameter(f"{name}.weight").device)

    weights = {name: (on_device(name, "A"), on_device(name, "B")) for name in info.targets}
    return LoraAdapter(info.rank, info.alpha, weights)


def read_checkpoint(path: Path | str) -> CheckpointInfo:
    """The manifest, after every file has been checked against it.

    Raises:
        CheckpointError: names the file that is missing or torn.
    """
    directory = Path(path)
    restore_set_aside(directory)
    if not directory.is_dir():
        raise CheckpointError(f"checkpoint {directory} does not exist; give the path that a save returned")
    manifest = _read_manifest(directory)
    for name, facts in manifest.files.items():
        file = directory / name
        if not file.is_file():
            raise CheckpointError(f"checkpoint {directory} is torn: {name} is missing")
        if file.stat().st_size != facts["bytes"] or _sha256(file) != facts["sha256"]:
            raise CheckpointError(f"checkpoint {directory} is torn: {name} is not what manifest.json recorded")
    return manifest


def set_expiry(path: Path | str, expires_at: float | None) -> None:
    """Change when a checkpoint expires (seconds since the epoch; None is never).

    Raises:
        CheckpointError: missing, torn, or the disk refused the write.
    """
    directory = read_checkpoint(path).path
    manifest = {**json.loads((directory / MANIFEST).read_text()), "expires_at": expires_at}
    try:
        atomic_write(directory / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    except OSError as exc:
        raise CheckpointError(f"checkpoint {directory}: {MANIFEST} could not be written: {exc}") from exc


def delete_checkpoint(path: Path | str) -> None:
    """Delete a checkpoint; it is gone from every listing in one step.

    Raises:
        CheckpointError: there is no checkpoint, or the disk refused.
    """
    directory = Path(path)
    restore_set_aside(directory)
    if not (directory / MANIFEST).is_file():
        raise CheckpointError(f"checkpoint {directory} does not exist; there is nothing to delete")
    try:
        remove_directory(directory)
    except OSError as exc:
        raise CheckpointError(f"checkpoint {directory} could not be deleted: {exc}") from exc


def list_checkpoints(directory: Path) -> list[CheckpointInfo]:
    """All complete checkpoints in a directory, oldest first."""
    if not directory.is_dir():
        return []
    for aside in directory.glob(".*.old-*"):
        restore_set_aside(directory / aside.name[1:].rsplit(".old-", 1)[0])
    found = []
    for path in directory.iterdir():
        if path.name.startswith(".") or not (path / MANIFEST).is_file():
            continue
        try:
            found.append(read_checkpoint(path))
        except CheckpointError:
            continue
    return sorted(found, key=lambda info: (info.created_at, info.path.name))


def checkpoint_path(directory: Path, name: str) -> Path:
    """``directory/name``.

    Raises:
        CheckpointError: the name is not plain and could leave the directory or be hidden in it.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise CheckpointError(
            f"checkpoint name {name!r} is refused: use letters, digits and . _ = + - only, at most 200, no leading dot"
        )
    return Path(directory) / name


def _read_manifest(directory: Path) -> CheckpointInfo:
    try:
        raw = json.loads((directory / MANIFEST).read_text())
        version = raw.pop("format_version")
        if version != FORMAT_VERSION:
            raise CheckpointError(f"checkpoint {directory} has format {version}; this version reads {FORMAT_VERSION}")
        info = CheckpointInfo(path=directory, **raw)
    except FileNotFoundError as exc:
        raise CheckpointError(f"checkpoint {directory} is torn: {MANIFEST} is missing") from exc
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise CheckpointError(f"checkpoint {directory} is torn: {MANIFEST} cannot be read ({exc})") from exc
    needed = {ADAPTER, ADAPTER_CONFIG} | ({OPTIMIZER} if info.kind == "training" else set())
    if not needed <= set(info.files):
        raise CheckpointError(f"checkpoint {directory} is torn: {MANIFEST} lists no {min(needed - set(info.files))}")
    return info


def check_base(info: CheckpointInfo, base: BaseModel) -> None:
    """Raises CheckpointError unless the checkpoint was made for this base model."""
    differing = [key for key in base.identity if info.base_identity.get(key) != base.identity[key]]
    if differing:
        seen = ", ".join(f"{key} {info.base_identity.get(key)} / {base.identity[key]}" for key in differing[:2])
        raise CheckpointError(
            f"checkpoint {info.path} was made for another base model ({info.base_model}); checkpoint / loaded: {seen}"
        )


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


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
