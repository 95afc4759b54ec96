"""Makes models: fresh ones, and ones with a checkpoint's weights."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

from nat_plugin_evsys.engine.checkpoints import check_base
from nat_plugin_evsys.engine.gradient.trainable import TrainableModel
from nat_plugin_evsys.engine.model.targets import linear_roles, select_targets
from nat_plugin_evsys.errors import ConfigError, UnsupportedError
from nat_plugin_evsys.runtime.bases import SharedBase
from nat_plugin_evsys.service.store.operations import Operation
from nat_plugin_evsys.service.store.rows import ModelRow
from nat_plugin_evsys.service.wire.requests import (
    CreateModel,
    LoadWeights,
    LoraChoice,
    OptimizerChoice,
    check_adamw,
    metadata_of,
    parse,
)
from nat_plugin_evsys.service.work.access import CheckpointAccess
from nat_plugin_evsys.service.work.model import fresh_model
from nat_plugin_evsys.service.work.states import Snapshots

if TYPE_CHECKING:
    from nat_plugin_evsys.service.store.store import Store

_SEED_BITS = 63


class ModelOpening:
    """The first operation of a model. Run again after a kill it gives the same model: its row was stored first."""

    def __init__(self, store: Store, access: CheckpointAccess, snapshots: Snapshots) -> None:
        self._store = store
        self._access = access
        self._snapshots = snapshots

    def create(self, operation: Operation, shared: SharedBase) -> TrainableModel:
        """A fresh adapter, as ``create_model`` asks for it.

        Raises:
            DataError, ConfigError, UnsupportedError, ModelError: the request is wrong.
            StoreError: the row could not be kept.
        """
        body = parse(CreateModel, operation.payload)
        _check_optimizer(body.optimizer_config)
        lora = body.lora_config or LoraChoice()
        flags: dict[str, Any] = {f"train_{role}": getattr(lora, f"train_{role}") for role in ("attn", "mlp", "unembed")}
        if not any(flags.values()):
            raise ConfigError("nothing to train: set at least one of train_mlp, train_attn, train_unembed to True")
        select_targets(shared.base.model, **flags)
        row = ModelRow(
            model_id=operation.scope,
            session_id=body.session_id,
            owner=operation.owner,
            model_seq_id=body.model_seq_id,
            base_model=shared.base.name,
            lora_rank=lora.rank,
            lora_seed=secrets.randbits(_SEED_BITS) if lora.seed is None else lora.seed,
            **flags,
            user_metadata=self._metadata(body.session_id, body.user_metadata),
        )
        return fresh_model(shared, self._keep(row))

    def load(self, operation: Operation, body: LoadWeights, shared: SharedBase) -> TrainableModel:
        """A model with a checkpoint's shape and weights. Its state is written before anybody hears of it, so that it
        does not depend on the checkpoint's being there still.

        Raises:
            CheckpointError: missing, torn, of another base model, or without the optimizer asked for.
            DataError, ConfigError, UnsupportedError: the request is wrong.
            StoreError: the row could not be kept.
        """
        known = self._store.model(operation.scope)
        if known is not None and known.snapshot is not None:
            return self._snapshots.open(shared, known.model_id, known.snapshot)
        _check_optimizer(body.optimizer_config)
        if body.weights_access_token is not None:
            raise UnsupportedError("weights_access_token is not offered: there are no accounts; publish the checkpoint")
        info = self._access.read(body.path, operation.owner)
        check_base(info, shared.base)
        metadata = self._metadata(body.session_id or "", body.user_metadata)
        model = shared.train_checkpoint(info, with_optimizer=body.optimizer)
        name, _ = self._snapshots.write(operation.scope, 0, model)
        roles = linear_roles(shared.base.model)
        trained = {roles[target] for target in model.adapter.weights}
        self._keep(
            ModelRow(
                model_id=operation.scope,
                session_id=body.session_id or "",
                owner=operation.owner,
                model_seq_id=body.model_seq_id or 0,
                base_model=shared.base.name,
                lora_rank=info.rank,
                train_attn="attn" in trained,
                train_mlp="mlp" in trained,
                train_unembed="unembed" in trained,
                user_metadata=metadata,
                snapshot=name,
                snapshot_seq=0,
                loaded_from=body.path,
            )
        )
        return model

    def _metadata(self, session_id: str, given: dict[str, str] | None) -> dict[str, str]:
        """The session's metadata, and the model's own."""
        session = self._store.session(session_id)
        of_session = {} if session is None else {k: v for k, v in session.user_metadata.items() if isinstance(v, str)}
        return {**of_session, **metadata_of(given)}

    def _keep(self, row: ModelRow) -> ModelRow:
        """Store a row; the one that is there already, if a killed run of the same request stored it."""
        self._store.add_model(row).result()
        return self._store.model(row.model_id) or row


def _check_optimizer(chosen: OptimizerChoice | None) -> None:
    if chosen is not None:
        check_adamw(chosen.type)
