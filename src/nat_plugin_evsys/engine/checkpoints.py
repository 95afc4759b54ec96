"""Checkpoints on disk: a PEFT directory plus, for resuming, the optimizer, and a manifest that proves it whole.

<name>/
  adapter_config.json, adapter_model.safetensors      what ``peft.PeftModel.from_pretrained(base, dir)`` loads
  optimizer.safetensors                               AdamW's moments (kind "training" only)
  manifest.json                                       step, base model identity, LoRA shape, SHA-256 of each file

A PEFT directory without a manifest is one of another program (``foreign_adapter``): its weights are as good, but only
their shapes say that it is whole and made for the base model.
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

from safetensors import SafetensorError
from safetensors.torch import save_file

from nat_plugin_evsys.engine.gradient.trainable import TrainableModel
from nat_plugin_evsys.engine.model.foreign_adapter import read_foreign_adapter
from nat_plugin_evsys.engine.model.loading import BaseModel
from nat_plugin_evsys.engine.model.lora import LoraAdapter
from nat_plugin_evsys.engine.model.peft_check import say_if_peft_differs
from nat_plugin_evsys.engine.model.peft_format import (
    ADAPTER,
    ADAPTER_CONFIG,
    adapter_config,
    to_peft_names,
)
from nat_plugin_evsys.errors import CheckpointError
from nat_plugin_evsys.files import atomic_directory, atomic_write, remove_directory, restore_set_aside

Kind = Literal["sampler", "training", "external"]

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
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

    @property
    def is_foreign(self) -> bool:
        """Whether another program wrote it, so that there is no manifest."""
        return not self.base_identity


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


def read_checkpoint(path: Path | str) -> CheckpointInfo:
    """The manifest, after every file has been checked against it; of a foreign adapter what its own files say.

    Raises:
        CheckpointError: names the file that is missing or torn.
    """
    directory = Path(path)
    restore_set_aside(directory)
    if not directory.is_dir():
        raise CheckpointError(f"checkpoint {directory} does not exist; give the path that a save returned")
    if _is_foreign(directory):
        return _foreign(directory)
    manifest = _complete(directory)
    for name, facts in manifest.files.items():
        if _sha256(directory / name) != facts["sha256"]:
            raise _changed(directory, name)
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
    """All complete checkpoints in a directory, oldest first. Their files have the sizes of the manifest; what is in
    them is read with ``read_checkpoint``, before it is used."""
    if not directory.is_dir():
        return []
    for aside in directory.glob(".*.old-*"):
        restore_set_aside(directory / aside.name[1:].rsplit(".old-", 1)[0])
    found = []
    for path in directory.iterdir():
        if path.name.startswith(".") or not (path / MANIFEST).is_file():
            continue
        try:
            found.append(_complete(path))
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


def _complete(directory: Path) -> CheckpointInfo:
    """The manifest of a checkpoint whose files are there, as long as it says.

    Raises:
        CheckpointError: names the file that is missing or torn.
    """
    manifest = _read_manifest(directory)
    for name, facts in manifest.files.items():
        file = directory / name
        if not file.is_file():
            raise CheckpointError(f"checkpoint {directory} is torn: {name} is missing")
        if file.stat().st_size != facts["bytes"]:
            raise _changed(directory, name)
    return manifest


def _changed(directory: Path, name: str) -> CheckpointError:
    return CheckpointError(f"checkpoint {directory} is torn: {name} is not what manifest.json recorded")


def _is_foreign(directory: Path) -> bool:
    """Whether it has what PEFT writes, and nothing that only a checkpoint has: that would be one that lost a file."""
    own = any((directory / name).exists() for name in (MANIFEST, OPTIMIZER))
    return not own and (directory / ADAPTER_CONFIG).is_file()


def _foreign(directory: Path) -> CheckpointInfo:
    found = read_foreign_adapter(directory)
    return CheckpointInfo(
        path=directory,
        kind="sampler",
        step=0,
        created_at=(directory / ADAPTER).stat().st_mtime,
        base_model=found.base_model,
        base_identity={},
        rank=found.rank,
        alpha=found.alpha,
        targets=found.targets,
        files={},
        user_metadata={},
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
