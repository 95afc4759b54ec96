"""Routes of sampling sessions."""

from __future__ import annotations

import asyncio
import secrets
import time

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from nat_plugin_evsys.runtime.bases import BASE_POLICY_VERSION
from nat_plugin_evsys.service.http.bounds import parse_as
from nat_plugin_evsys.service.http.context import API, ServiceContext, accepted
from nat_plugin_evsys.service.http.refusals import bad_request
from nat_plugin_evsys.service.store.store import SamplerRow
from nat_plugin_evsys.service.wire.addresses import MAX_SEQ_ID
from nat_plugin_evsys.web.json_bodies import read_json

_MAX_TEXT = 4096


class _Create(BaseModel):
    model_config = ConfigDict(extra="ignore", protected_namespaces=(), strict=True)

    session_id: str = Field(max_length=_MAX_TEXT)
    sampling_session_seq_id: int = Field(ge=0, le=MAX_SEQ_ID)
    base_model: str | None = Field(default=None, max_length=_MAX_TEXT)
    model_path: str | None = Field(default=None, max_length=_MAX_TEXT)


class _Join(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    sampling_session_id: str = Field(max_length=_MAX_TEXT)


class SamplerRoutes:
    """``create_sampling_session`` and requests about sampling sessions."""

    def __init__(self, context: ServiceContext) -> None:
        self._context = context

    def routes(self) -> list[Route]:
        """Starlette's routes."""
        route = self._context.route
        return [
            route("POST", f"{API}/create_sampling_session", self._create),
            route("POST", f"{API}/join_sampling_session", self._join),
            route("GET", f"{API}/samplers/{{sampler_id}}", self._get),
        ]

    async def _create(self, request: Request, owner: str) -> Response:
        _, value = await read_json(request)
        asked = parse_as(_Create, value)
        session = await self._context.read(self._context.session, asked.session_id, owner)
        base_model = await asyncio.to_thread(self._base_model, asked, owner)
        row = SamplerRow(
            sampler_id=f"{session.session_id}:sample:{asked.sampling_session_seq_id}",
            session_id=session.session_id,
            owner=owner,
            seq_id=asked.sampling_session_seq_id,
            base_model=base_model,
            model_path=asked.model_path,
            directory=None,
            model_id=None,
            step=0,
            created_at=time.time(),
            dropped=False,
        )
        row.check_number(await self._context.written(self._context.store.add_sampler(row)))
        return accepted(type="create_sampling_session", sampling_session_id=row.sampler_id)

    def _base_model(self, asked: _Create, owner: str) -> str:
        """The base model of a new sampling session, which must be served here.

        Raises:
            Refusal: 400 nothing to sample from.
            ModelError: the base model is not served.
            CheckpointError: the checkpoint is missing, torn, or another key's.
        """
        if asked.model_path is None and asked.base_model is None:
            raise bad_request("give `base_model` or `model_path`: there is nothing to sample from")
        if asked.model_path is not None:
            return self._context.engine.sampling_client(asked.model_path, owner)[1].name
        client, base = self._context.engine.sampling_client(asked.base_model or "", owner)
        if client.policy_version != BASE_POLICY_VERSION:
            raise bad_request(f"{asked.base_model!r} is not a base model; give a checkpoint as `model_path`")
        return base.name

    async def _join(self, request: Request, owner: str) -> Response:
        """A random number for another client of a sampling session; the first one has 0. None is recorded."""
        _, value = await read_json(request)
        await self._context.read(self._context.sampler, parse_as(_Join, value).sampling_session_id, owner)
        # The SDK makes 64-bit seq_ids of it: client_counter * 1e9 + n.
        return accepted(type="join_sampling_session", client_counter=1 + secrets.randbelow(2**32))

    async def _get(self, request: Request, owner: str) -> Response:
        row = await self._context.read(self._context.sampler, request.path_params["sampler_id"], owner)
        return accepted(sampler_id=row.sampler_id, base_model=row.base_model, model_path=row.model_path)
