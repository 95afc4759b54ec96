"""Runs one training operation on a model and says how it ended."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nat_plugin_evsys.engine.checkpoints import Kind, load_checkpoint
from nat_plugin_evsys.engine.gradient.trainable import TrainableModel
from nat_plugin_evsys.errors import (
    CheckpointError,
    DataError,
    EvsysError,
    NonFiniteGradientError,
    OperationAbandoned,
    UnsupportedError,
)
from nat_plugin_evsys.runtime.arguments import check_ttl
from nat_plugin_evsys.runtime.checkpoint_store import SCHEME, CheckpointStore
from nat_plugin_evsys.runtime.runs import RunRecord
from nat_plugin_evsys.service.store.operations import JSON, PROTOBUF, Effect, Operation, OperationKind, Outcome
from nat_plugin_evsys.service.wire.forward_backward import decode_forward_backward, encode_forward_backward
from nat_plugin_evsys.service.wire.requests import LoadWeights, OptimStep, SaveWeights, metadata_of, parse
from nat_plugin_evsys.service.work.access import CheckpointAccess
from nat_plugin_evsys.service.work.failures import failure, failure_of
from nat_plugin_evsys.service.work.model import HostedModel
from nat_plugin_evsys.service.work.opening import ModelOpening
from nat_plugin_evsys.service.work.samplers import Samplers
from nat_plugin_evsys.service.work.states import Snapshots

if TYPE_CHECKING:
    from nat_plugin_evsys.service.store.rows import ModelRow

_KINDS: dict[OperationKind, Kind] = {
    OperationKind.SAVE_WEIGHTS: "training",
    OperationKind.SAVE_WEIGHTS_FOR_SAMPLER: "sampler",
    OperationKind.SAVE_WEIGHTS_EXTERNAL: "external",
}


class Execution:
    """What the operations of the protocol do. Runs in the training thread of the model's base."""

    def __init__(
        self,
        checkpoints: CheckpointStore,
        access: CheckpointAccess,
        snapshots: Snapshots,
        samplers: Samplers,
        opening: ModelOpening,
    ) -> None:
        self._checkpoints = checkpoints
        self._access = access
        self._snapshots = snapshots
        self._samplers = samplers
        self._opening = opening
        self._handlers: dict[OperationKind, Callable[[HostedModel, Operation, threading.Event], Outcome]] = {
            OperationKind.CREATE_MODEL: self._open,
            OperationKind.FORWARD_BACKWARD: self._forward_backward,
            OperationKind.OPTIM_STEP: self._optim_step,
            OperationKind.SAVE_WEIGHTS: self._save,
            OperationKind.SAVE_WEIGHTS_FOR_SAMPLER: self._save_for_sampler,
            OperationKind.SAVE_WEIGHTS_EXTERNAL: self._save,
            OperationKind.LOAD_WEIGHTS: self._load,
        }

    def run(self, hosted: HostedModel, operation: Operation, stop: threading.Event) -> Outcome:
        """The outcome of an operation. What it raises becomes a failure; after one nobody foresaw, the model is
        evicted, so that its state is again what the journal says.

        Raises:
            OperationAbandoned: ``stop`` was set; nothing has changed.
        """
        try:
            return self._handlers[operation.kind](hosted, operation, stop)
        except OperationAbandoned:
            raise
        except Exception as exc:  # noqa: BLE001 - boundary: whatever an operation raises belongs to its future
            outcome = failure_of(operation, self._public(exc))
            if operation.kind in (OperationKind.OPTIM_STEP, OperationKind.LOAD_WEIGHTS) and _unforeseen(exc):
                hosted.evict()
            return outcome

    def _public(self, error: Exception) -> Exception:
        """The same error without where the server keeps its files, which is nobody's business."""
        if not isinstance(error, CheckpointError):
            return error
        shown = CheckpointError(str(error).replace(f"{self._checkpoints.root}/", SCHEME))
        shown.__cause__ = error.__cause__
        return shown

    def _open(self, hosted: HostedModel, operation: Operation, _: threading.Event) -> Outcome:
        model = self._opening.create(operation, hosted.shared)
        hosted.adopt(model)
        return answer(type="create_model", model_id=hosted.model_id)

    def _forward_backward(self, hosted: HostedModel, operation: Operation, stop: threading.Event) -> Outcome:
        request = decode_forward_backward(operation.payload)
        _refuse_loss(request.loss_fn)
        model = hosted.loaded(stop)

        def progress(done: int, total: int) -> None:
            if stop.is_set():
                raise OperationAbandoned

        method = TrainableModel.forward if request.forward_only else TrainableModel.forward_backward
        output = method(model, request.data, request.loss_fn, request.loss_fn_config, progress)
        if not request.forward_only:
            hosted.tokens_trained += int(output.metrics.get("datum_tokens:sum", 0))
        effect = Effect.NONE if request.forward_only else Effect.APPLIED
        return Outcome(encode_forward_backward(output), PROTOBUF, effect=effect)

    def _optim_step(self, hosted: HostedModel, operation: Operation, stop: threading.Event) -> Outcome:
        model = hosted.loaded(stop)
        lost = hosted.lost
        if lost is not None and operation.created_at <= lost.stored_at:
            model.discard_gradient()
            message = (
                f"optim_step refused: the gradient is incomplete: forward_backward {lost.seq_id} failed: {lost.error}"
            )
            return failure(message, effect=Effect.CLEARED)
        try:
            response = model.optim_step(parse(OptimStep, operation.payload).params.params())
        except NonFiniteGradientError as exc:
            return failure_of(operation, exc, Effect.CLEARED)
        return answer(Effect.APPLIED, metrics=response.metrics)

    def _save(self, hosted: HostedModel, operation: Operation, stop: threading.Event) -> Outcome:
        body = parse(SaveWeights, operation.payload)
        if body.age_encryption_recipients:
            raise UnsupportedError("age_encryption_recipients is not offered: weights are exported as they are")
        path = self._save_named(hosted, operation, body, hosted.loaded(stop))
        return answer(path=path, type=operation.kind.value)

    def _save_for_sampler(self, hosted: HostedModel, operation: Operation, stop: threading.Event) -> Outcome:
        body = parse(SaveWeights, operation.payload)
        if body.kind != "snapshot":
            raise UnsupportedError(
                f"kind={body.kind!r} is not offered: no sequence mixes two policy versions here; take snapshots"
            )
        if body.path is not None:
            path = self._save_named(hosted, operation, body, hosted.loaded(stop))
            return answer(path=path, type=operation.kind.value)
        if body.sampling_session_seq_id is None:
            raise DataError("save_weights_for_sampler needs path (a name) or sampling_session_seq_id (ephemeral)")
        row = hosted.row()
        _check_owner(row, operation)
        model = hosted.loaded(stop)
        sampler_id = self._samplers.keep(row, model, hosted.shared, body.sampling_session_seq_id, operation.seq_id)
        return answer(sampling_session_id=sampler_id, type=operation.kind.value)

    def _save_named(self, hosted: HostedModel, operation: Operation, body: SaveWeights, model: TrainableModel) -> str:
        if not body.path:
            raise DataError(f"{operation.kind} needs path, the name of the checkpoint")
        row = hosted.row()
        _check_owner(row, operation)
        path = self._checkpoints.save(
            record_of(row),
            model,
            body.path,
            kind=_KINDS[operation.kind],
            overwrite=body.overwrite,
            ttl_seconds=check_ttl(body.ttl_seconds),
            user_metadata=metadata_of(body.user_metadata),
            request_id=operation.request_id,
        )
        # One of that name may have been published before it expired; nobody has published this one.
        self._access.withdraw(path)
        return path

    def _load(self, hosted: HostedModel, operation: Operation, stop: threading.Event) -> Outcome:
        body = parse(LoadWeights, operation.payload)
        if operation.seq_id == 0:
            hosted.adopt(self._opening.load(operation, body, hosted.shared))
            return answer(path=body.path, model_id=hosted.model_id, type="load_weights")
        _refuse_token(body)
        model = hosted.loaded(stop)
        info = self._access.read(body.path, operation.owner)
        load_checkpoint(info.path, model, with_optimizer=body.optimizer)
        try:
            self._snapshots.write(hosted.model_id, operation.seq_id, model)
        except CheckpointError:
            hosted.evict()
            raise
        return answer(Effect.APPLIED, path=body.path, model_id=hosted.model_id, type="load_weights")


def answer(effect: Effect = Effect.NONE, **facts: Any) -> Outcome:
    """A JSON Outcome."""
    return Outcome(json.dumps(facts).encode(), JSON, effect=effect)


def record_of(row: ModelRow) -> RunRecord:
    """The training run that a model is."""
    return RunRecord(
        model_id=row.model_id,
        base_model=row.base_model,
        lora_rank=row.lora_rank,
        train_attn=row.train_attn,
        train_mlp=row.train_mlp,
        train_unembed=row.train_unembed,
        user_metadata=row.user_metadata,
        created_at=row.created_at,
    )


def _check_owner(row: ModelRow, operation: Operation) -> None:
    if row.owner != operation.owner:
        raise DataError(f"there is no model {row.model_id}")


def _refuse_loss(loss_fn: str) -> None:
    if loss_fn == "custom":
        raise UnsupportedError("loss_fn 'custom' is not offered: use forward_backward_custom, which runs on the client")
    if loss_fn == "stable_reinforce":
        raise UnsupportedError("loss_fn 'stable_reinforce' is not offered: its formula is not public")


def _refuse_token(body: LoadWeights) -> None:
    if body.weights_access_token is not None:
        raise UnsupportedError("weights_access_token is not offered: there are no accounts; publish the checkpoint")


def _unforeseen(error: Exception) -> bool:
    return not isinstance(error, EvsysError)
