"""``forward_backward`` and ``optim_step``."""

from __future__ import annotations

import threading

from nat_plugin_evsys.engine.gradient.trainable import TrainableModel
from nat_plugin_evsys.errors import NonFiniteGradientError, OperationAbandoned, UnsupportedError
from nat_plugin_evsys.service.store.operations import PROTOBUF, Effect, Operation, Outcome
from nat_plugin_evsys.service.wire.forward_backward import ForwardBackwardRequest
from nat_plugin_evsys.service.wire.requests import OptimStep
from nat_plugin_evsys.service.wire.results import encode_forward_backward
from nat_plugin_evsys.service.work.failures import answer, failure, failure_of
from nat_plugin_evsys.service.work.model import HostedModel
from nat_plugin_evsys.service.work.places import Places


def forward_backward(places: Places, hosted: HostedModel, operation: Operation, stop: threading.Event) -> Outcome:
    """Add the gradient of a request's Datums to the accumulated one, or, with ``forward_only``, just its results."""
    request = operation.request
    assert isinstance(request, ForwardBackwardRequest)
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


def optim_step(places: Places, hosted: HostedModel, operation: Operation, stop: threading.Event) -> Outcome:
    """Step with the accumulated gradient, unless a part of it is missing that the client cannot have known of."""
    model = hosted.loaded(stop)
    lost = hosted.lost
    if lost is not None and operation.created_at <= lost.stored_at:
        model.discard_gradient()
        message = f"optim_step refused: the gradient is incomplete: forward_backward {lost.seq_id} failed: {lost.error}"
        return failure(message, effect=Effect.CLEARED)
    request = operation.request
    assert isinstance(request, OptimStep)
    try:
        response = model.optim_step(request.params.params())
    except NonFiniteGradientError as exc:
        return failure_of(operation, exc, Effect.CLEARED)
    return answer(Effect.APPLIED, metrics=response.metrics)


def _refuse_loss(loss_fn: str) -> None:
    if loss_fn == "custom":
        raise UnsupportedError("loss_fn 'custom' is not offered: use forward_backward_custom, which runs on the client")
    if loss_fn == "stable_reinforce":
        raise UnsupportedError("loss_fn 'stable_reinforce' is not offered: its formula is not public")
