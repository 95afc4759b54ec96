"""The operations of the protocol: stored, handed to the engine, and answered with the id of their future."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from nat_plugin_evsys.errors import Refusal
from nat_plugin_evsys.service.http.bounds import parse_as
from nat_plugin_evsys.service.http.context import API, ServiceContext, accepted, session_of
from nat_plugin_evsys.service.http.refusals import not_found
from nat_plugin_evsys.service.store.operations import PROTOBUF, Operation
from nat_plugin_evsys.service.wire.addresses import ModelStep, NewModel, SamplerStep
from nat_plugin_evsys.service.wire.kinds import OperationKind
from nat_plugin_evsys.service.wire.scan import forward_backward_address
from nat_plugin_evsys.web.bodies import read_body
from nat_plugin_evsys.web.json_bodies import JsonLimits, beside_loop, read_json

_PROMPT = JsonLimits(bytes=16 << 20, values=1_000_000, containers=10_000)


@dataclass(frozen=True)
class _Sent:
    """A request for an operation; ``value`` is the JSON object in its body."""

    kind: OperationKind
    owner: str
    body: bytes
    value: dict[str, Any] | None = None


class OperationRoutes:
    """``create_model`` … ``asample``.

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
        ]

    # -- training ---------------------------------------------------------------------------------------------------

    async def _create_model(self, request: Request, owner: str) -> Response:
        body, value = await read_json(request)
        return await self._start_model(_Sent(OperationKind.CREATE_MODEL, owner, body, value), parse_as(NewModel, value))

    async def _load_weights(self, request: Request, owner: str) -> Response:
        """Into an existing model, or (with ``session_id``) as the first operation of a new one."""
        body, value = await read_json(request)
        sent = _Sent(OperationKind.LOAD_WEIGHTS, owner, body, value)
        if value.get("session_id") is not None:
            return await self._start_model(sent, parse_as(NewModel, value))
        return await self._model_step(sent, parse_as(ModelStep, value))

    def _step(self, kind: OperationKind) -> Any:
        async def handler(request: Request, owner: str) -> Response:
            body, value = await read_json(request)
            return await self._model_step(_Sent(kind, owner, body, value), parse_as(ModelStep, value))

        return handler

    async def _forward_backward(self, request: Request, owner: str) -> Response:
        content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if content_type != PROTOBUF:
            raise Refusal(
                415, f"forward_backward takes {PROTOBUF} (tinker SDK 0.28 or newer), got {content_type[:80]!r}"
            )
        config = self._context.config
        body = await read_body(request, config.max_request_bytes, config.max_decompressed_bytes)
        step = await beside_loop(len(body), _address, body)
        return await self._model_step(_Sent(OperationKind.FORWARD_BACKWARD, owner, body), step)

    async def _start_model(self, sent: _Sent, asked: NewModel) -> Response:
        await self._context.read(self._context.session, asked.session_id, sent.owner)
        return accepted(request_id=await self._store(sent, asked.model_id, 0))

    async def _model_step(self, sent: _Sent, step: ModelStep) -> Response:
        await self._context.read(self._check_model, step.model_id, sent.owner)
        return accepted(request_id=await self._store(sent, step.model_id, step.seq_id), model_id=step.model_id)

    def _check_model(self, model_id: str, owner: str) -> None:
        """The model exists, or is still being created (the SDK knows ids in advance)."""
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
        body, value = await read_json(request, _PROMPT)
        asked = parse_as(SamplerStep, value)
        await self._context.read(self._check_sampler, asked.sampling_session_id, owner)
        sent = _Sent(OperationKind.SAMPLE, owner, body, value)
        request_id = await self._store(sent, asked.sampling_session_id, asked.seq_id)
        # A request that is sent again gets the same ids.
        ids = [f"{request_id}:{index}" for index in range(asked.num_samples)]
        return accepted(request_id=request_id, sample_sequence_ids=ids)

    def _check_sampler(self, sampler_id: str, owner: str) -> None:
        row = self._context.sampler(sampler_id, owner)
        self._context.session(row.session_id, owner)

    # -- the queue --------------------------------------------------------------------------------------------------

    async def _store(self, sent: _Sent, scope: str, seq_id: int) -> str:
        """Store the operation, hand it to the engine, and return its future's id (for a repeat, the earlier one)."""
        operation = Operation(uuid.uuid4().hex, sent.owner, sent.kind, scope, seq_id, sent.body, value=sent.value)
        # Shielded: once it is stored the engine must hear of it, whether or not the client is still there.
        return await asyncio.shield(self._take(operation))

    async def _take(self, operation: Operation) -> str:
        request_id, is_new = await self._context.written(self._context.store.add_operation(operation))
        if is_new:
            self._context.metrics.operation_submitted(operation.kind)
            self._context.engine.submit(operation)
        return request_id


def _address(body: bytes) -> ModelStep:
    """The address of a protobuf ``ForwardBackwardRequest``; the rest of it is not read here."""
    model_id, seq_id = forward_backward_address(body)
    return parse_as(ModelStep, {"model_id": model_id, "seq_id": seq_id})
