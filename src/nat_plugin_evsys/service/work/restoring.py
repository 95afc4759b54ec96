"""Rebuilds a model that is not in memory: loads its last saved state and replays the operations since."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nat_plugin_evsys.engine.gradient.trainable import TrainableModel
from nat_plugin_evsys.errors import OperationAbandoned
from nat_plugin_evsys.runtime.bases import SharedBase
from nat_plugin_evsys.service.store.operations import Effect, Operation
from nat_plugin_evsys.service.wire.decode import decode
from nat_plugin_evsys.service.wire.forward_backward import ForwardBackwardRequest
from nat_plugin_evsys.service.wire.kinds import OperationKind
from nat_plugin_evsys.service.wire.requests import OptimStep
from nat_plugin_evsys.service.work.lost_gradient import LostGradient, recall_lost_gradient
from nat_plugin_evsys.service.work.states import SavedStates

if TYPE_CHECKING:
    from nat_plugin_evsys.service.store.rows import ModelRow
    from nat_plugin_evsys.service.store.store import Store


@dataclass(frozen=True)
class Restored:
    """A restored model.

    Attributes:
        model: its weights, moments and gradient.
        settled_seq: the last operation after which no gradient was pending.
        changed: its weights differ from its last saved state.
        lost: what the gradient lacks.
        replayed: number of replayed operations.
    """

    model: TrainableModel
    settled_seq: int
    changed: bool
    lost: LostGradient | None
    replayed: int


def fresh_model(shared: SharedBase, row: ModelRow) -> TrainableModel:
    """The model as ``create_model`` made it: its row says which."""
    return shared.fresh(
        rank=row.lora_rank,
        seed=row.lora_seed,
        train_attn=row.train_attn,
        train_mlp=row.train_mlp,
        train_unembed=row.train_unembed,
    )


def restore(store: Store, states: SavedStates, shared: SharedBase, row: ModelRow, stop: threading.Event) -> Restored:
    """The model of a row.

    Raises:
        EvsysError, OSError: that is not possible.
        OperationAbandoned: ``stop`` was set meanwhile.
    """
    if row.saved_state is None:
        model, settled = fresh_model(shared, row), -1
    else:
        model, settled = states.open(shared, row.model_id, row.saved_state), row.saved_state_seq
    changed, steps = False, [settled]
    replay = store.to_replay(row.model_id, settled)
    for operation, effect in replay:
        _run_again(states, model, operation, effect, stop)
        changed |= operation.kind == OperationKind.OPTIM_STEP and effect == Effect.APPLIED
        if operation.kind != OperationKind.FORWARD_BACKWARD:
            steps.append(operation.seq_id)
        if model.gradient is None:
            settled = operation.seq_id
    lost = recall_lost_gradient(store, row.model_id, max(settled, *steps))
    return Restored(model, settled, changed, lost, len(replay))


def _run_again(
    states: SavedStates, model: TrainableModel, operation: Operation, effect: Effect, stop: threading.Event
) -> None:
    def progress(done: int, total: int) -> None:
        if stop.is_set():
            raise OperationAbandoned

    progress(0, 0)
    if effect == Effect.CLEARED:
        model.discard_gradient()
        return
    if operation.kind == OperationKind.LOAD_WEIGHTS:
        states.load_into(model, operation.scope, str(operation.seq_id))
        return
    # Not operation.request, which would keep every one of them decoded until the last has run.
    request = decode(operation.kind, operation.payload)
    if isinstance(request, ForwardBackwardRequest):
        model.forward_backward(request.data, request.loss_fn, request.loss_fn_config, progress)
    elif isinstance(request, OptimStep):
        model.optim_step(request.params.params())
