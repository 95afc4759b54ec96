"""The operations of the protocol: stored, handed to the engine, and answered with the id of their future."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from nat_plugin_evsys.service.http.bounds import MAX_SEQ_ID, parse_as, read_body, read_json
from nat_plugin_evsys.service.http.context import API, ServiceContext, accepted, session_of
from nat_plugin_evsys.service.http.refusals import Refusal, bad_request, not_found
from nat_plugin_evsys.service.store.operations import PROTOBUF, Operation, OperationKind
from nat_plugin_evsys.service.wire.scan import forward_backward_address

_MAX_ID = 200
_MAX_SAMPLES = 4096
_OFF_LOOP_BYTES = 1 << 20


class _Address(BaseModel):
    model_config = ConfigDict(extra="ignore", protected_namespaces=(), strict=True)


class _NewModel(_Address):
    session_id: str = Field(max_length=_MAX_ID)
    model_seq_id: int = Field(ge=0, le=MAX_SEQ_ID)


class _ModelStep(_Address):
    model_id: str = Field(max_length=_MAX_ID)
    seq_id: int = Field(ge=0, le=MAX_SEQ_ID)


class _SamplerStep(_Address):
    sampling_session_id: str = Field(max_length=_MAX_ID)
    seq_id: int = Field(ge=0, le=MAX_SEQ_ID)
    num_samples: int = Field(default=1, ge=1, le=_MAX_SAMPLES)


class _Future(_Address):
    request_id: str = Field(max_length=_MAX_ID)


class OperationRoutes:
    """``create_model`` … ``asample``, and the futures that they are answered with.

    Only what addresses an operation is checked here. What is wrong with the rest of it, the engine says in its
    outcome: the SDK raises that at once, while it would send again for minutes what got an error status of a server.
    """

    def __init__(self, context: ServiceContext) -> None:
        self._context = context

    def routes(self) -> list[Route]:
        """Starlette's routes."""
        route = self._context.route
        steps = (
            OperationKind.OPTIM_STEP,
            OperationKind.SAVE_WEIGHTS,
            OperationKind.SAVE_WEIGHTS_FOR_SAMPLER,
            OperationKind.SAVE_WEIGHTS_EXTERNAL,
        )
        return [
            route("POST", f"{API}/create_model", self._create_model),
            route("POST", f"{API}/forward_backward", self._forward_backward),
            route("POST", f"{API}/load_weights", self._load_weights),
            *(route("POST", f"{API}/{kind}", self._step(kind)) for kind in steps),
            route("POST", f"{API}/asample", self._sample),
            route("POST", f"{API}/retrieve_future", self._retrieve),
            route("POST", f"{API}/cancel_future", self._cancel),
        ]

    # -- training ---------------------------------------------------------------------------------------------------

    async def _create_model(self, request: Request, owner: str) -> Response:
        body, value = await read_json(request, self._context.limits)
        return await self._start_model(OperationKind.CREATE_MODEL, parse_as(_NewModel, value), owner, body)

    async def _load_weights(self, request: Request, owner: str) -> Response:
        """Into an existing model, or (with ``session_id``) as the first operation of a new one."""
        body, value = await read_json(request, self._context.limits)
        if value.get("session_id") is not None:
            return await self._start_model(OperationKind.LOAD_WEIGHTS, parse_as(_NewModel, value), owner, body)
        return await self._model_step(OperationKind.LOAD_WEIGHTS, parse_as(_ModelStep, value), owner, body)

    def _step(self, kind: OperationKind) -> Any:
        async def handler(request: Request, owner: str) -> Response:
            body, value = await read_json(request, self._context.limits)
            return await self._model_step(kind, parse_as(_ModelStep, value), owner, body)

        return handler

    async def _forward_backward(self, request: Request, owner: str) -> Response:
        content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if content_type != PROTOBUF:
            raise Refusal(
                415, f"forward_backward takes {PROTOBUF} (tinker SDK 0.28 or newer), got {content_type[:80]!r}"
            )
        body = await read_body(request, self._context.limits)
        if len(body) < _OFF_LOOP_BYTES:
            step = _address(body)
        else:
            step = await asyncio.to_thread(_address, body)
        return await self._model_step(OperationKind.FORWARD_BACKWARD, step, owner, body)

    async def _start_model(self, kind: OperationKind, asked: _NewModel, owner: str, body: bytes) -> Response:
        self._context.session(asked.session_id, owner)
        return await self._submit(kind, f"{asked.session_id}:train:{asked.model_seq_id}", 0, owner, body)

    async def _model_step(self, kind: OperationKind, step: _ModelStep, owner: str, body: bytes) -> Response:
        if step.seq_id < 1:
            raise bad_request("`seq_id` of a training operation counts from 1; 0 is the creation of the model")
        self._check_model(step.model_id, owner)
        return await self._submit(kind, step.model_id, step.seq_id, owner, body, model_id=step.model_id)

    def _check_model(self, model_id: str, owner: str) -> None:
        """The model is there, or its creation is still under way (the SDK's ids are known before that)."""
        store = self._context.store
        row = store.model(model_id)
        if row is None and store.unfinished(model_id):
            self._context.session(session_of(model_id), owner)
            return
        row = row or store.model(model_id)  # its creation may have ended between the two looks
        if row is None or row.owner != owner:
            raise not_found(f"model {model_id!r}")
        self._context.session(row.session_id, owner)

    # -- sampling ---------------------------------------------------------------------------------------------------

    async def _sample(self, request: Request, owner: str) -> Response:
        body, value = await read_json(request, self._context.limits)
        asked = parse_as(_SamplerStep, value)
        row = self._context.store.sampler(asked.sampling_session_id)
        if row is None or row.owner != owner:
            raise not_found(f"sampling session {asked.sampling_session_id!r}")
        self._context.session(row.session_id, owner)
        operation = await self._store(OperationKind.SAMPLE, row.sampler_id, asked.seq_id, owner, body)
        # A request that is sent again gets the same ids.
        ids = [f"{operation}:{index}" for index in range(asked.num_samples)]
        return accepted(request_id=operation, sample_sequence_ids=ids)

    # -- the queue --------------------------------------------------------------------------------------------------

    async def _submit(
        self, kind: OperationKind, scope: str, seq_id: int, owner: str, body: bytes, *, model_id: str | None = None
    ) -> Response:
        return accepted(request_id=await self._store(kind, scope, seq_id, owner, body), model_id=model_id)

    async def _store(self, kind: OperationKind, scope: str, seq_id: int, owner: str, body: bytes) -> str:
        """Store the operation, hand it to the engine, and give the id of its future: the earlier one for a repeat."""
        operation = Operation(uuid.uuid4().hex, owner, kind, scope, seq_id, body)
        # Shielded: once it is stored the engine must hear of it, whether or not the client is still there.
        return await asyncio.shield(self._take(operation))

    async def _take(self, operation: Operation) -> str:
        request_id, is_new = await self._context.written(self._context.store.add_operation(operation))
        if is_new:
            self._context.metrics.operation_submitted(operation.kind)
            self._context.engine.submit(operation)
        return request_id

    # -- futures ----------------------------------------------------------------------------------------------------

    async def _retrieve(self, request: Request, owner: str) -> Response:
        """The outcome, held back until it is there; 408 tells the SDK to ask again at once, without a word."""
        _, value = await read_json(request, self._context.limits)
        request_id = parse_as(_Future, value).request_id
        stored = await self._context.pending.outcome(request_id, owner)
        if stored is None or stored.outcome is None:
            return JSONResponse(
                {"type": "try_again", "request_id": request_id, "queue_state": "active"}, status_code=408
            )
        return Response(stored.outcome.body, media_type=stored.outcome.content_type)

    async def _cancel(self, request: Request, owner: str) -> Response:
        """Best effort: what is being sampled stops; what trains goes on."""
        _, value = await read_json(request, self._context.limits)
        request_id = parse_as(_Future, value).request_id
        stored = self._context.store.outcome(request_id)
        if stored is None or stored.owner != owner:
            raise not_found(f"request {request_id!r}")
        self._context.engine.cancel(request_id)
        return accepted(request_id=request_id)


def _address(body: bytes) -> _ModelStep:
    """What a protobuf ``ForwardBackwardRequest`` is for; the rest of it is not read here."""
    model_id, seq_id = forward_backward_address(body)
    return parse_as(_ModelStep, {"model_id": model_id, "seq_id": seq_id})
