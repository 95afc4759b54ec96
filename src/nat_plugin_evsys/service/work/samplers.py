"""What clients sample from: base models, checkpoints and ephemeral weights; recently used ones stay in memory."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from nat_plugin_evsys.engine.checkpoint_loading import load_adapter
from nat_plugin_evsys.engine.checkpoints import save_checkpoint
from nat_plugin_evsys.engine.gradient.trainable import TrainableModel
from nat_plugin_evsys.engine.model.loading import BaseModel
from nat_plugin_evsys.engine.model.peft_format import ADAPTER
from nat_plugin_evsys.engine.sampling.client import LocalSamplingClient
from nat_plugin_evsys.errors import CheckpointError, ModelError
from nat_plugin_evsys.runtime.bases import BASE_POLICY_VERSION, SharedBase
from nat_plugin_evsys.runtime.checkpoint_store import SCHEME
from nat_plugin_evsys.service.store.rows import ModelRow, SamplerRow, inflight_directory
from nat_plugin_evsys.service.work.access import CheckpointAccess, expired, manifest
from nat_plugin_evsys.service.work.adapter_cache import AdapterCache, Key
from nat_plugin_evsys.service.work.served_bases import ServedBases

if TYPE_CHECKING:
    from nat_plugin_evsys.service.store.store import Store

KEPT_EPHEMERAL = 64
"""Ephemeral weights of one model that are kept; an older one is refused by name."""

_MEMORY_BYTES = 2 * 2**30


class Samplers:
    """Opens samplers. Safe to use from several threads.

    Args:
        root: directory of the ephemeral weights, one below it for each.
        memory_bytes: of adapters that are kept in memory; at least one is.
    """

    def __init__(
        self,
        store: Store,
        bases: ServedBases,
        access: CheckpointAccess,
        root: Path,
        *,
        memory_bytes: int = _MEMORY_BYTES,
    ) -> None:
        self.root = root
        self._store = store
        self._bases = bases
        self._access = access
        self._loading = threading.Lock()
        self._clients = AdapterCache(memory_bytes)
        self._opened: dict[str, Key] = {}

    def open(self, row: SamplerRow) -> LocalSamplingClient:
        """The client of a sampling session. It always samples from the same weights, or not at all; an inflight session
        samples from those that its model published last.

        Raises:
            CheckpointError: its weights are gone, expired, no longer what they were, or no longer for its owner.
            ModelError: its base model is not served.
        """
        if row.dropped:
            raise CheckpointError(
                f"sampling session {row.sampler_id} has ended: the newest {KEPT_EPHEMERAL} unnamed weights of a model "
                "are kept; save weights under a name to keep them"
            )
        if row.model_path is not None:
            self._access.check_kept(row.model_path, row.owner)
        place = _place(row)
        key = self._opened.get(place)
        client = None if key is None else self._clients.get(key)
        if client is not None:
            return client
        if row.directory is not None:
            key, client = self._weights(self.root / row.directory, self._bases.get(row.base_model), row.sampler_id)
        elif row.model_path is None:
            return self._bases.get(row.base_model).sampler.client(None, BASE_POLICY_VERSION)
        else:
            key, client, _ = self._checkpoint(row.model_path, row.owner)
        if self._opened.setdefault(place, key) != key and not row.inflight:
            raise CheckpointError(
                f"checkpoint {row.model_path} was overwritten after sampling session {row.sampler_id} was opened; "
                "create a new sampling client"
            )
        return client

    def find(self, model: str, owner: str) -> tuple[LocalSamplingClient, BaseModel]:
        """The client of a base model's name, a tinker:// path, or a training run's id (its newest sampler checkpoint).

        Raises:
            CheckpointError, ModelError: there is none that this owner may use.
        """
        shared = None if model.startswith(SCHEME) else self._bases.find(model)
        if shared is not None:
            return shared.sampler.client(None, BASE_POLICY_VERSION), shared.base
        path = model if model.startswith(SCHEME) else self._access.newest_sampler(model, owner)
        if path is None:
            raise ModelError(
                f"there is no model {model!r} here; give a base model ({', '.join(self._bases.names)}), a tinker:// "
                "path, or the id of a training run that has saved weights for sampling"
            )
        _, client, shared = self._checkpoint(path, owner)
        return client, shared.base

    def keep(
        self, model_row: ModelRow, model: TrainableModel, shared: SharedBase, number: int, seq: int, *, inflight: bool
    ) -> str:
        """Keep a model's current weights as sampling session ``number``; returns its id.

        ``inflight`` weights also become those of every inflight session that the model published before. Repeated after
        a kill for the same operation ``seq``, it writes the same weights in the same place.

        Raises:
            DataError: the number is another sampler's.
            CheckpointError: the disk refused the write.
        """
        name = inflight_directory(model_row.model_id) if inflight else f"{model_row.model_id}/{seq}"
        row = SamplerRow(
            sampler_id=f"{model_row.session_id}:sample:{number}",
            session_id=model_row.session_id,
            owner=model_row.owner,
            seq_id=number,
            base_model=shared.base.name,
            directory=name,
            model_id=model_row.model_id,
            step=model.step,
            created_at=time.time(),
        )
        known = self._store.sampler(row.sampler_id)
        if known is not None:
            row.check_number(known)
        with self._loading:  # nobody reads weights that are being replaced
            directory = save_checkpoint(self.root / model_row.model_id, Path(name).name, model, kind="sampler")
            key = _key(shared, directory)
        self._store.add_sampler(row).result()
        if key is not None:
            self._clients.put(key, shared.sampler.client(model.adapter, model.step), model.adapter)
            replaced, self._opened[_place(row)] = self._opened.get(_place(row)), key
            self._drop_unused(replaced)
        self._drop_oldest(model_row.model_id)
        return row.sampler_id

    def close_session(self, session_id: str) -> None:
        """Unload what a session samples from; it is reloaded on demand."""
        for sampler_id in [each for each in list(self._opened) if each.startswith(f"{session_id}:")]:
            if (key := self._opened.get(sampler_id)) is not None:
                self._clients.drop(key)

    def forget_session(self, session_id: str) -> None:
        """Delete a session's ephemeral weights."""
        self.close_session(session_id)
        for sampler_id in [each for each in list(self._opened) if each.startswith(f"{session_id}:")]:
            self._opened.pop(sampler_id, None)
        for directory in self.root.glob(f"{session_id}:*"):
            shutil.rmtree(directory, ignore_errors=True)

    def memory(self) -> int:
        """Bytes of the adapters in memory."""
        return self._clients.bytes()

    def _checkpoint(self, path: str, owner: str) -> tuple[Key, LocalSamplingClient, SharedBase]:
        self._access.check(path, owner)
        directory = self._access.directory(path)
        facts = manifest(directory)
        if facts is not None and not expired(facts):
            for shared in self._bases.all():
                if facts.get("base_identity") == shared.base.identity:
                    return *self._weights(directory, shared, path), shared
        # Not there, expired or of another base model: this says which.
        info = self._access.read(path, owner)
        shared = self._bases.of_checkpoint(info)
        return *self._weights(directory, shared, path), shared

    def _weights(self, directory: Path, shared: SharedBase, name: str) -> tuple[Key, LocalSamplingClient]:
        """The client of a directory's weights, loaded if they are not in memory; ``name``: for error messages."""
        with self._loading:
            key = _key(shared, directory)
            if key is None:
                raise CheckpointError(f"the weights of {name} do not exist any more")
            client = self._clients.get(key)
            if client is None:
                try:
                    adapter = load_adapter(directory, shared.base)
                except CheckpointError as exc:
                    raise CheckpointError(str(exc).replace(str(directory), name)) from exc
                client = shared.sampler.client(adapter, key[2])
                self._clients.put(key, client, adapter)
            return key, client

    def _drop_oldest(self, model_id: str) -> None:
        rows = [row for row in self._store.samplers(model_id=model_id) if row.directory and not row.dropped]
        for row in [row for row in rows if not row.inflight][:-KEPT_EPHEMERAL]:
            self._store.drop_sampler(row.sampler_id).result()
            self._drop_unused(self._opened.pop(row.sampler_id, None))
            shutil.rmtree(self.root / str(row.directory), ignore_errors=True)

    def _drop_unused(self, key: Key | None) -> None:
        if key is not None and key not in list(self._opened.values()):
            self._clients.drop(key)


def _place(row: SamplerRow) -> str:
    """Where the key of a session's weights is kept: inflight sessions share it, as they share the weights."""
    return str(row.directory) if row.inflight else row.sampler_id


def _key(shared: SharedBase, directory: Path) -> Key | None:
    facts = manifest(directory)
    if facts is None:
        return None
    return shared.base.name, facts["files"][ADAPTER]["sha256"], int(facts["step"])
