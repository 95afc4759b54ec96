"""``save_weights``, ``save_weights_for_sampler`` and ``save_weights_external``."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from nat_plugin_evsys.engine.checkpoints import Kind
from nat_plugin_evsys.errors import DataError, UnsupportedError
from nat_plugin_evsys.runtime.arguments import check_ttl
from nat_plugin_evsys.service.store.operations import Operation, Outcome
from nat_plugin_evsys.service.store.rows import INFLIGHT
from nat_plugin_evsys.service.wire.kinds import OperationKind
from nat_plugin_evsys.service.wire.requests import SaveWeights, metadata_of
from nat_plugin_evsys.service.work.failures import answer
from nat_plugin_evsys.service.work.model import HostedModel
from nat_plugin_evsys.service.work.places import Places

if TYPE_CHECKING:
    from nat_plugin_evsys.service.store.rows import ModelRow

_KINDS: dict[OperationKind, Kind] = {
    OperationKind.SAVE_WEIGHTS: "training",
    OperationKind.SAVE_WEIGHTS_FOR_SAMPLER: "sampler",
    OperationKind.SAVE_WEIGHTS_EXTERNAL: "external",
}


def save(places: Places, hosted: HostedModel, operation: Operation, stop: threading.Event) -> Outcome:
    """Save a named checkpoint."""
    request = _asked(operation)
    if request.age_encryption_recipients:
        raise UnsupportedError("age_encryption_recipients is not offered: weights are exported as they are")
    return answer(path=_save_named(places, hosted, operation, stop), type=operation.kind.value)


def save_for_sampler(places: Places, hosted: HostedModel, operation: Operation, stop: threading.Event) -> Outcome:
    """Save weights for sampling: under a name, as the unnamed ones of a sampling session, or as the model's inflight
    ones, which all its inflight sampling sessions sample from."""
    request = _asked(operation)
    if request.kind not in ("snapshot", INFLIGHT):
        raise DataError(f"kind must be 'snapshot' or 'inflight', got {request.kind!r}")
    inflight = request.kind == INFLIGHT
    if inflight and request.path is not None:
        raise DataError("inflight weights have no name: leave out path, or ask for kind='snapshot'")
    if request.path is not None:
        return answer(path=_save_named(places, hosted, operation, stop), type=operation.kind.value)
    number = request.sampling_session_seq_id
    if number is None:
        raise DataError("save_weights_for_sampler needs path (a name) or sampling_session_seq_id (ephemeral)")
    row, model = _own_row(hosted, operation), hosted.loaded(stop)
    sampler_id = places.samplers.keep(row, model, hosted.shared, number, operation.seq_id, inflight=inflight)
    return answer(sampling_session_id=sampler_id, type=operation.kind.value)


def _save_named(places: Places, hosted: HostedModel, operation: Operation, stop: threading.Event) -> str:
    request, model = _asked(operation), hosted.loaded(stop)
    if not request.path:
        raise DataError(f"{operation.kind} needs path, the name of the checkpoint")
    return places.checkpoints.save(
        _own_row(hosted, operation).run_record(),
        model,
        request.path,
        kind=_KINDS[operation.kind],
        overwrite=request.overwrite,
        ttl_seconds=check_ttl(request.ttl_seconds),
        user_metadata=metadata_of(request.user_metadata),
        request_id=operation.request_id,
        # One of that name may have been published; nobody has published this one.
        before=places.access.withdraw,
    )


def _asked(operation: Operation) -> SaveWeights:
    assert isinstance(operation.request, SaveWeights)
    return operation.request


def _own_row(hosted: HostedModel, operation: Operation) -> ModelRow:
    row = hosted.row()
    if row.owner != operation.owner:
        raise DataError(f"there is no model {row.model_id}")
    return row
