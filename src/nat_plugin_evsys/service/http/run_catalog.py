"""Training runs and checkpoints as their owner sees them. Reads files: call it off the event loop."""

from __future__ import annotations

from datetime import UTC, datetime

from tinker import types

from nat_plugin_evsys.errors import CheckpointError
from nat_plugin_evsys.runtime.checkpoint_store import SCHEME, CheckpointStore
from nat_plugin_evsys.runtime.runs import RunRecord
from nat_plugin_evsys.service.http.refusals import not_found
from nat_plugin_evsys.service.store.store import Store
from nat_plugin_evsys.service.work.access import CheckpointAccess, expired, manifest


class RunCatalog:
    """Lists, describes, publishes and deletes.

    Args:
        store: owners, models, what is published.
        checkpoints: the checkpoints themselves.
    """

    def __init__(self, store: Store, checkpoints: CheckpointStore) -> None:
        self._store = store
        self._checkpoints = checkpoints
        self._access = CheckpointAccess(store, checkpoints)

    # -- runs -------------------------------------------------------------------------------------------------------

    def runs(self, owner: str) -> list[RunRecord]:
        """The owner's training runs, newest first: those in the store and those that have saved something."""
        live = {row.model_id: row.run_record() for row in self._store.models(owner=owner)}
        saved = {run.model_id: run for run in self._checkpoints.runs() if self._store.run_owner(run.model_id) == owner}
        records = {**saved, **live}
        return sorted(records.values(), key=lambda run: run.created_at, reverse=True)

    def run(self, run_id: str, owner: str) -> RunRecord:
        """One of them.

        Raises:
            Refusal: 404 there is none, or it is another key's.
        """
        row = self._store.model(run_id)
        if row is not None and row.owner == owner:
            return row.run_record()
        if row is None and self._store.run_owner(run_id) == owner:
            try:
                return self._checkpoints.run(run_id)
            except CheckpointError as error:
                raise not_found(f"training run {run_id[:64]!r}") from error
        raise not_found(f"training run {run_id[:64]!r}")

    def describe(self, record: RunRecord, owner: str) -> types.TrainingRun:
        """Tinker's form of a run."""
        run = record.to_tinker(self._listed(record.model_id))
        row = self._store.model(record.model_id)
        session = self._store.session(row.session_id) if row is not None else None
        seen = record.last_request_at if session is None else session.last_seen
        return run.model_copy(update={"model_owner": owner, "last_request_time": datetime.fromtimestamp(seen, UTC)})

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def checkpoints(self, run_id: str, owner: str) -> list[types.Checkpoint]:
        """The complete checkpoints of a run, oldest first.

        Raises:
            Refusal: 404 there is no such run, or it is another key's.
        """
        self.run(run_id, owner)
        return self._listed(run_id)

    def all_checkpoints(self, owner: str) -> list[types.Checkpoint]:
        """The checkpoints of all the owner's runs, newest first."""
        found = [each for run in self.runs(owner) for each in self._listed(run.model_id)]
        return sorted(found, key=lambda each: each.time, reverse=True)

    def _listed(self, run_id: str) -> list[types.Checkpoint]:
        return [
            each.model_copy(update={"public": self._store.is_published(each.tinker_path)})
            for each in self._checkpoints.checkpoints(run_id)
        ]

    def own(self, run_id: str, kind: str, name: str, owner: str) -> str:
        """The tinker:// path of an existing checkpoint of the owner's.

        Raises:
            Refusal: 404 there is none, or it is another key's.
        """
        path = f"{SCHEME}{run_id}/{kind}/{name}"
        self._access.check(path, owner)
        facts = manifest(self._access.directory(path))
        # One that is published may be read by all, but nobody but its owner disposes of it.
        if facts is None or self._store.run_owner(run_id) != owner or expired(facts):
            raise not_found(f"checkpoint {path[:300]}")
        return path

    def delete(self, path: str, owner: str) -> None:
        """Delete a checkpoint; one of the same name that is saved later is not public."""
        self._store.unpublish(path).result()
        self._checkpoints.delete(path)

    def publish(self, path: str, owner: str, public: bool) -> None:
        """Let every key sample from and load a checkpoint, or stop that."""
        (self._store.publish(path, owner) if public else self._store.unpublish(path)).result()

    def set_ttl(self, path: str, ttl_seconds: int | None) -> None:
        """Let a checkpoint expire that many seconds from now, or never."""
        self._checkpoints.set_ttl(path, ttl_seconds)

    def weights_info(self, path: str, owner: str) -> types.WeightsInfoResponse:
        """Base model and LoRA shape of a checkpoint that the owner may load.

        Raises:
            CheckpointError: malformed, missing, torn, expired, or not for this owner.
        """
        info = self._access.read(path, owner)
        record = self._checkpoints.run(path.removeprefix(SCHEME).split("/", 1)[0])
        return record.weights_info(info)

    def expire(self) -> None:
        """Delete expired checkpoints."""
        for run in self._checkpoints.runs():
            self._checkpoints.checkpoints(run.model_id)
