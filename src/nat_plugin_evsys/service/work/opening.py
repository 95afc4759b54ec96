"""``create_model`` and ``load_weights``: makes models, and puts a checkpoint's weights into them."""

from __future__ import annotations

import secrets
import threading
from typing import Any

from nat_plugin_evsys.engine.checkpoint_loading import check_base, load_checkpoint
from nat_plugin_evsys.engine.gradient.trainable import TrainableModel
from nat_plugin_evsys.engine.model.targets import linear_roles, select_targets
from nat_plugin_evsys.errors import CheckpointError, ConfigError, UnsupportedError
from nat_plugin_evsys.runtime.bases import SharedBase
from nat_plugin_evsys.service.store.operations import Effect, Operation, Outcome
from nat_plugin_evsys.service.store.rows import ModelRow
from nat_plugin_evsys.service.wire.requests import (
    MAX_RANK,
    CreateModel,
    LoadWeights,
    LoraChoice,
    OptimizerChoice,
    check_adamw,
    metadata_of,
)
from nat_plugin_evsys.service.work.failures import answer
from nat_plugin_evsys.service.work.model import HostedModel
from nat_plugin_evsys.service.work.places import Places
from nat_plugin_evsys.service.work.restoring import fresh_model

_SEED_BITS = 63


def create(places: Places, hosted: HostedModel, operation: Operation, stop: threading.Event) -> Outcome:
    """The first operation of a model: a fresh adapter. Repeated after a kill it gives the same one, because its row was
    stored first."""
    request = operation.request
    assert isinstance(request, CreateModel)
    _check_optimizer(request.optimizer_config)
    lora = request.lora_config or LoraChoice()
    if lora.rank == 0:  # SkyRL's server takes it for all weights
        raise UnsupportedError(
            f"lora_config.rank is 0: finetuning all weights is not offered; give a LoRA rank from 1 to {MAX_RANK}"
        )
    flags: dict[str, Any] = {f"train_{role}": getattr(lora, f"train_{role}") for role in ("attn", "mlp", "unembed")}
    if not any(flags.values()):
        raise ConfigError("nothing to train: set at least one of train_mlp, train_attn, train_unembed to True")
    select_targets(hosted.shared.base.model, **flags)
    row = ModelRow(
        model_id=operation.scope,
        session_id=request.session_id,
        owner=operation.owner,
        model_seq_id=request.model_seq_id,
        base_model=hosted.shared.base.name,
        lora_rank=lora.rank,
        lora_seed=secrets.randbits(_SEED_BITS) if lora.seed is None else lora.seed,
        **flags,
        user_metadata=_metadata(places, request.session_id, request.user_metadata),
    )
    hosted.adopt(fresh_model(hosted.shared, _keep(places, row)))
    return answer(type="create_model", model_id=hosted.model_id)


def load(places: Places, hosted: HostedModel, operation: Operation, stop: threading.Event) -> Outcome:
    """A checkpoint's weights: into the model, or, as its first operation, into a new one of the checkpoint's shape."""
    request = operation.request
    assert isinstance(request, LoadWeights)
    if operation.seq_id == 0:
        hosted.adopt(_load_new(places, operation, request, hosted.shared))
        return answer(path=request.path, model_id=hosted.model_id, type="load_weights")
    _refuse_token(request)
    model = hosted.loaded(stop)
    info = places.access.read(request.path, operation.owner)
    load_checkpoint(info.path, model, with_optimizer=request.optimizer)
    try:
        places.states.write(hosted.model_id, operation.seq_id, model)
    except CheckpointError:
        hosted.evict()
        raise
    return answer(Effect.APPLIED, path=request.path, model_id=hosted.model_id, type="load_weights")


def _load_new(places: Places, operation: Operation, request: LoadWeights, shared: SharedBase) -> TrainableModel:
    """Its state is saved before the client hears of it, so that it no longer depends on the checkpoint."""
    known = places.store.model(operation.scope)
    if known is not None and known.saved_state is not None:
        return places.states.open(shared, known.model_id, known.saved_state)
    _check_optimizer(request.optimizer_config)
    _refuse_token(request)
    info = places.access.read(request.path, operation.owner)
    check_base(info, shared.base)
    metadata = _metadata(places, request.session_id or "", request.user_metadata)
    model = shared.train_checkpoint(info, with_optimizer=request.optimizer)
    name, _ = places.states.write(operation.scope, 0, model)
    roles = linear_roles(shared.base.model)
    trained = {roles[target] for target in model.adapter.weights}
    row = ModelRow(
        model_id=operation.scope,
        session_id=request.session_id or "",
        owner=operation.owner,
        model_seq_id=request.model_seq_id or 0,
        base_model=shared.base.name,
        lora_rank=info.rank,
        train_attn="attn" in trained,
        train_mlp="mlp" in trained,
        train_unembed="unembed" in trained,
        user_metadata=metadata,
        saved_state=name,
        saved_state_seq=0,
    )
    _keep(places, row)
    return model


def _metadata(places: Places, session_id: str, given: dict[str, str] | None) -> dict[str, str]:
    """The session's metadata, and the model's own."""
    session = places.store.session(session_id)
    of_session = {} if session is None else {k: v for k, v in session.user_metadata.items() if isinstance(v, str)}
    return {**of_session, **metadata_of(given)}


def _keep(places: Places, row: ModelRow) -> ModelRow:
    """Store a row; the one that is there already, if a killed run of the same request stored it."""
    places.store.add_model(row).result()
    return places.store.model(row.model_id) or row


def _check_optimizer(chosen: OptimizerChoice | None) -> None:
    if chosen is not None:
        check_adamw(chosen.type)


def _refuse_token(request: LoadWeights) -> None:
    if request.weights_access_token is not None:
        raise UnsupportedError("weights_access_token is not offered: there are no accounts; publish the checkpoint")
