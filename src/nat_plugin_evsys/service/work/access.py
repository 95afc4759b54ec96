"""Who may read which checkpoint. Another owner's checkpoint looks exactly like one that does not exist."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nat_plugin_evsys.engine.checkpoints import MANIFEST, CheckpointInfo, checkpoint_path, read_checkpoint
from nat_plugin_evsys.errors import CheckpointError
from nat_plugin_evsys.runtime.checkpoint_store import SCHEME, SEGMENTS, CheckpointStore, parse_path

if TYPE_CHECKING:
    from nat_plugin_evsys.service.store.store import Store


class CheckpointAccess:
    """Finds the checkpoints that an owner may sample from and load: its own and the published ones."""

    def __init__(self, store: Store, checkpoints: CheckpointStore) -> None:
        self._store = store
        self._checkpoints = checkpoints

    def read(self, path: str, owner: str) -> CheckpointInfo:
        """A checkpoint by tinker:// path, every file checked.

        Raises:
            CheckpointError: malformed, missing, not for this owner, torn or expired.
        """
        self.check(path, owner)
        if not (self.directory(path) / MANIFEST).is_file():
            raise _missing(path)
        try:
            return read_checkpoint(self._checkpoints.resolve(path))
        except CheckpointError as exc:
            raise self.public(exc) from exc

    def public(self, error: CheckpointError) -> CheckpointError:
        """The same error without the server's file paths, which clients must not see."""
        root = str(self._checkpoints.root)
        shown = CheckpointError(str(error).replace(f"{root}/", SCHEME).replace(root, "the server's store"))
        shown.__cause__ = error.__cause__
        return shown

    def check(self, path: str, owner: str) -> None:
        """Raises CheckpointError if the path is malformed or not for this owner."""
        model_id = parse_path(path)[0]
        if self._store.run_owner(model_id) != owner and not self._store.is_published(path):
            raise _missing(path)

    def check_kept(self, path: str, owner: str) -> None:
        """Raises what ``read`` does unless a checkpoint is there for this owner; its files are not checked."""
        self.check(path, owner)
        facts = manifest(self.directory(path))
        if facts is None or expired(facts):
            self.read(path, owner)  # says which

    def directory(self, path: str) -> Path:
        """The directory of a path's checkpoint, if there is one.

        Raises:
            CheckpointError: the path is malformed.
        """
        model_id, segment, name = parse_path(path)
        return checkpoint_path(self._checkpoints.root / model_id / segment, name)

    def withdraw(self, path: str) -> None:
        """Let only its owner use a checkpoint from now on."""
        self._store.unpublish(path).result()

    def newest_sampler(self, model_id: str, owner: str) -> str | None:
        """The path of a training run's newest sampler checkpoint."""
        if self._store.run_owner(model_id) != owner:
            return None
        segment = SEGMENTS["sampler"]
        found = (manifest(path) for path in (self._checkpoints.root / model_id / segment).glob("[!.]*"))
        newest = max((m for m in found if m is not None), key=lambda m: m["created_at"], default=None)
        return None if newest is None else f"{SCHEME}{model_id}/{segment}/{newest['name']}"


def manifest(directory: Path) -> dict[str, Any] | None:
    """What a checkpoint's manifest says, with its ``name``, files unchecked; None if it cannot be read."""
    try:
        facts = json.loads((directory / MANIFEST).read_text())
    except (OSError, ValueError):
        return None
    return {**facts, "name": directory.name} if isinstance(facts, dict) else None


def expired(facts: dict[str, Any]) -> bool:
    """Whether the time of a checkpoint is up, by its manifest."""
    expires_at = facts.get("expires_at")
    return expires_at is not None and expires_at <= time.time()


def _missing(path: str) -> CheckpointError:
    return CheckpointError(f"checkpoint {path} does not exist; give the path that a save returned")
