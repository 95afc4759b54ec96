"""Routes of sessions, and those a client calls before it has one."""

from __future__ import annotations

import json
import time
import uuid
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from nat_plugin_evsys.config.serve import is_loopback
from nat_plugin_evsys.errors import Refusal
from nat_plugin_evsys.service.http.bounds import check_scope, page_of, parse_as
from nat_plugin_evsys.service.http.context import API, ServiceContext, accepted
from nat_plugin_evsys.service.http.refusals import not_found
from nat_plugin_evsys.service.store.store import SessionRow
from nat_plugin_evsys.web.bodies import read_body
from nat_plugin_evsys.web.json_bodies import read_json

_MAX_TEXT = 4096
_TELEMETRY_BYTES = 4 << 20
_FINISH_REASONS = ("success", "errored", "interrupted")


class _Body(BaseModel):
    model_config = ConfigDict(extra="ignore")


class _CreateSession(_Body):
    tags: list[str] = Field(default=[], max_length=256)
    user_metadata: dict[str, Any] | None = None
    sdk_version: str = Field(default="", max_length=_MAX_TEXT)
    project_id: str | None = Field(default=None, max_length=_MAX_TEXT)
    display_name: str | None = Field(default=None, max_length=_MAX_TEXT)


class _Heartbeat(_Body):
    session_id: str


class _FinishReason(_Body):
    type: str = "success"


class _Finish(_Body):
    reason: _FinishReason = _FinishReason()
    detail: str | None = None


class SessionRoutes:
    """Client configuration, sessions, heartbeats, capabilities, telemetry."""

    def __init__(self, context: ServiceContext) -> None:
        self._context = context

    def routes(self) -> list[Route]:
        """Starlette's routes."""
        route = self._context.route
        return [
            route("POST", f"{API}/client/config", self._client_config),
            route("POST", f"{API}/client/dynamic_config", self._dynamic_config),
            route("POST", f"{API}/telemetry", self._telemetry),
            route("GET", f"{API}/get_server_capabilities", self._capabilities),
            route("POST", f"{API}/create_session", self._create),
            route("POST", f"{API}/session_heartbeat", self._heartbeat),
            route("POST", f"{API}/sessions/{{session_id}}/finish", self._finish),
            route("GET", f"{API}/sessions", self._list),
            route("GET", f"{API}/sessions/{{session_id}}", self._get),
        ]

    async def _client_config(self, request: Request, owner: str) -> Response:
        """``client_config_response.ClientConfigResponse``: one request for each forward_backward, raw keys."""
        await read_json(request)
        return accepted(
            pjwt_auth_enabled=False,
            parallel_fwdbwd_chunks=False,
            fwdbwd_max_chunk_len=1_000_000,
            fwdbwd_max_chunk_bytes_count=min(48_000_000, self._context.config.max_request_bytes * 3 // 4),
            # Over a network zstd pays (bodies shrink tenfold), on loopback it only costs time.
            proto_compress_fwdbwd=not is_loopback(self._context.config.host),
        )

    async def _dynamic_config(self, request: Request, owner: str) -> Response:
        await read_json(request)
        return accepted(refresh_interval_sec=300, sample_cancel_enabled=True, sample_cancel_max_batch_size=64)

    async def _telemetry(self, request: Request, owner: str) -> Response:
        """Read and discarded: nothing is reported to anyone."""
        await read_body(request, _TELEMETRY_BYTES)
        return accepted(status="accepted")

    async def _capabilities(self, request: Request, owner: str) -> Response:
        models = [
            {
                "model_name": base.name,
                "max_context_length": base.context_length,
                "trainable": True,
                "sampleable": True,
            }
            for base in self._context.engine.base_models()
        ]
        return accepted(supported_models=models)

    async def _create(self, request: Request, owner: str) -> Response:
        _, value = await read_json(request)
        asked = parse_as(_CreateSession, value)
        now = time.time()
        row = SessionRow(
            session_id=str(uuid.uuid4()),
            owner=owner,
            created_at=now,
            last_seen=now,
            tags=asked.tags,
            user_metadata=asked.user_metadata or {},
            sdk_version=asked.sdk_version,
            finished=None,
            display_name=asked.display_name,
            project_id=asked.project_id,
        )
        await self._context.written(self._context.store.add_session(row))
        return accepted(type="create_session", session_id=row.session_id)

    async def _heartbeat(self, request: Request, owner: str) -> Response:
        _, value = await read_json(request)
        asked = parse_as(_Heartbeat, value)
        row = await self._context.read(self._context.session, asked.session_id, owner, for_work=False)
        if row.finished is not None:
            raise Refusal(410, f"session {row.session_id} was finished by its client")  # ends the SDK's heartbeats
        return accepted(type="session_heartbeat")

    async def _finish(self, request: Request, owner: str) -> Response:
        """Keeps the first reason. The session's models leave memory; its checkpoints and results stay."""
        _, value = await read_json(request)
        asked = parse_as(_Finish, value)
        session_id = request.path_params["session_id"]
        row = await self._context.read(self._context.session, session_id, owner, for_work=False)
        if asked.reason.type not in _FINISH_REASONS:
            raise Refusal(400, f"`reason.type` must be one of {', '.join(_FINISH_REASONS)}")
        if row.finished is None:
            await self._context.written(self._context.store.finish_session(row.session_id, asked.reason.type))
            self._context.park(row.session_id)
        return accepted(session_id=row.session_id, status=row.finished or asked.reason.type)

    async def _list(self, request: Request, owner: str) -> Response:
        check_scope(request)
        limit, offset = page_of(request, 20)
        rows = await self._context.read(self._context.store.sessions, owner=owner)
        rows.sort(key=lambda row: row.created_at, reverse=True)
        return accepted(sessions=[row.session_id for row in rows[offset : offset + limit]])

    async def _get(self, request: Request, owner: str) -> Response:
        check_scope(request)
        return JSONResponse(await self._context.read(self._describe, request.path_params["session_id"], owner))

    def _describe(self, session_id: str, owner: str) -> dict[str, Any]:
        """Raises Refusal: 404 there is none, or it is another key's."""
        store = self._context.store
        row = store.session(session_id)
        if row is None or row.owner != owner:
            raise not_found(f"session {session_id[:64]!r}")
        return {
            "training_run_ids": [model.model_id for model in store.models(session_id=session_id)],
            "sampler_ids": [sampler.sampler_id for sampler in store.samplers(session_id=session_id)],
            "user_metadata": _texts(row.user_metadata),
            "display_name": row.display_name,
        }


def _texts(metadata: dict[str, Any]) -> dict[str, str] | None:
    """Metadata as the protocol reads it back: from text to text."""
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    return texts or None
