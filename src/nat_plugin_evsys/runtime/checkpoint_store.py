"""Where the clients keep checkpoints: ``<root>/<model_id>/<segment of its kind>/<name>``, by tinker:// path."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path

from tinker import types

from nat_plugin_evsys.engine.checkpoints import (
    CheckpointInfo,
    FrozenWeights,
    Kind,
    checkpoint_path,
    delete_checkpoint,
    list_checkpoints,
    read_checkpoint,
    save_checkpoint,
    set_expiry,
)
from nat_plugin_evsys.engine.gradient.trainable import TrainableModel
from nat_plugin_evsys.errors import CheckpointError
from nat_plugin_evsys.files import atomic_write
from nat_plugin_evsys.runtime.runs import RUN_FILE, RunRecord

SCHEME = "tinker://"
SEGMENTS: dict[Kind, str] = {"training": "weights", "sampler": "sampler_weights", "external": "external_weights"}

_MODEL_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:=+-]{0,199}")


def default_store() -> Path:
    """``$EVSYS_HOME/checkpoints``, else ``./.evsys/checkpoints``."""
    return Path(os.environ.get("EVSYS_HOME") or ".evsys").expanduser() / "checkpoints"


class CheckpointStore:
    """Saves, finds, lists and deletes checkpoints below one directory. Safe to use from several threads.

    Args:
        root: the directory; created at the first save.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root).expanduser().absolute()

    def save(
        self,
        record: RunRecord,
        model: TrainableModel | FrozenWeights,
        name: str,
        *,
        kind: Kind,
        overwrite: bool,
        ttl_seconds: int | None,
        user_metadata: Mapping[str, str],
        request_id: str | None = None,
        before: Callable[[str], None] = lambda _: None,
    ) -> str:
        """Save a checkpoint of a training run; returns its tinker:// path.

        ``before`` is called with the path when only the disk can still refuse, and nothing has been written.

        With ``request_id``, a checkpoint that the same request saved before is overwritten.

        Raises:
            CheckpointError: the name is refused or taken, or the disk refused the write.
        """
        directory = self.root / record.model_id / SEGMENTS[kind]
        target = checkpoint_path(directory, name)
        path = f"{SCHEME}{record.model_id}/{SEGMENTS[kind]}/{name}"
        if target.exists() and not overwrite and not _saved_by(target, request_id):
            raise CheckpointError(f"checkpoint {path} exists; choose another name or pass overwrite=True")
        before(path)
        expires_at = None if ttl_seconds is None else time.time() + ttl_seconds
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            (self.root / record.model_id).mkdir(mode=0o700, exist_ok=True)
            directory.mkdir(mode=0o700, exist_ok=True)
            atomic_write(self.root / record.model_id / RUN_FILE, record.to_json())
        except OSError as exc:
            raise CheckpointError(f"checkpoint {path} could not be written below {self.root}: {exc}") from exc
        save_checkpoint(
            directory,
            name,
            model,
            kind=kind,
            user_metadata=user_metadata,
            expires_at=expires_at,
            request_id=request_id,
        )
        return path

    def resolve(self, path: str | Path) -> Path:
        """The directory of a ``tinker://`` path of this store, or of a plain directory that holds a checkpoint.

        Raises:
            CheckpointError: the path is malformed, leads out of the store, does not exist or has expired.
        """
        if not isinstance(path, (str, Path)) or not str(path):
            raise CheckpointError(f"a checkpoint path is a tinker:// path or a directory, got {path!r}")
        directory = self._directory(path) if str(path).startswith(SCHEME) else Path(path).expanduser()
        info = read_checkpoint(directory)
        if _expired(info):
            if str(path).startswith(SCHEME):
                delete_checkpoint(directory)
            raise CheckpointError(f"checkpoint {path} expired at {datetime.fromtimestamp(info.expires_at or 0, UTC)}")
        return directory

    def delete(self, path: str) -> None:
        """Delete the checkpoint of a tinker:// path. In-process clients sampling from it keep its weights."""
        delete_checkpoint(self._directory(path))

    def set_ttl(self, path: str, ttl_seconds: int | None) -> None:
        """Let a checkpoint expire that many seconds from now, or never."""
        self.resolve(path)
        set_expiry(self._directory(path), None if ttl_seconds is None else time.time() + ttl_seconds)

    def checkpoints(self, model_id: str) -> list[types.Checkpoint]:
        """The complete checkpoints of a training run, oldest first. Deletes expired ones."""
        found = []
        for kind, segment in SEGMENTS.items():
            for info in list_checkpoints(self._run_directory(model_id) / segment):
                if _expired(info):
                    delete_checkpoint(info.path)
                elif info.kind == kind:
                    found.append(_listed(info, model_id, segment))
        return sorted(found, key=lambda checkpoint: checkpoint.time)

    def runs(self) -> list[RunRecord]:
        """The training runs that have saved something, newest first."""
        if not self.root.is_dir():
            return []
        ids = [path.name for path in self.root.iterdir() if (path / RUN_FILE).is_file()]
        return sorted((self.run(model_id) for model_id in ids), key=lambda run: run.created_at, reverse=True)

    def run(self, model_id: str) -> RunRecord:
        """The record of a training run that has saved something.

        Raises:
            CheckpointError: there is none, or it cannot be read.
        """
        file = self._run_directory(model_id) / RUN_FILE
        try:
            return RunRecord(**json.loads(file.read_text()))
        except FileNotFoundError as exc:
            raise CheckpointError(f"there is no training run {model_id!r} in {self.root}") from exc
        except (OSError, ValueError, TypeError) as exc:
            raise CheckpointError(f"{file} cannot be read: {exc}") from exc

    def _run_directory(self, model_id: str) -> Path:
        if not isinstance(model_id, str) or not _MODEL_ID.fullmatch(model_id):
            raise CheckpointError(f"training run id {model_id!r} is malformed; give the one of TrainingClient.model_id")
        return self._inside(self.root / model_id)

    def _directory(self, path: str | Path) -> Path:
        """The directory that a tinker:// path names, whether it exists or not."""
        model_id, segment, name = parse_path(path)
        return self._inside(checkpoint_path(self._run_directory(model_id) / segment, name))

    def _inside(self, directory: Path) -> Path:
        # The names cannot leave the store, but a symbolic link below it could.
        if not directory.resolve().is_relative_to(self.root.resolve()):
            raise CheckpointError(f"{directory} leads out of the checkpoint store {self.root}")
        return directory


def parse_path(path: str | Path) -> tuple[str, str, str]:
    """``(model_id, segment, name)`` of ``tinker://<model_id>/{weights|sampler_weights|external_weights}/<name>``.

    Raises:
        CheckpointError: it is none.
    """
    parts = path.removeprefix(SCHEME).split("/") if isinstance(path, str) and path.startswith(SCHEME) else []
    if len(parts) != 3 or parts[1] not in SEGMENTS.values():
        raise CheckpointError(
            f"checkpoint path {path!r} is malformed; expected tinker://<model_id>/weights/<name>, "
            "…/sampler_weights/<name> or …/external_weights/<name>, as a save returned it"
        )
    return parts[0], parts[1], parts[2]


def _saved_by(directory: Path, request_id: str | None) -> bool:
    if request_id is None:
        return False
    try:
        return read_checkpoint(directory).request_id == request_id
    except CheckpointError:
        return False


def _expired(info: CheckpointInfo) -> bool:
    return info.expires_at is not None and info.expires_at <= time.time()


def _listed(info: CheckpointInfo, model_id: str, segment: str) -> types.Checkpoint:
    return types.Checkpoint(
        checkpoint_id=f"{segment}/{info.path.name}",
        checkpoint_type=info.kind,
        time=datetime.fromtimestamp(info.created_at, UTC),
        tinker_path=f"{SCHEME}{model_id}/{segment}/{info.path.name}",
        size_bytes=sum(facts["bytes"] for facts in info.files.values()),
        user_metadata=info.user_metadata or None,
        expires_at=None if info.expires_at is None else datetime.fromtimestamp(info.expires_at, UTC),
    )
