"""Training runs and checkpoints: list, describe, expire, publish, delete."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from nat_plugin_evsys.runtime.arguments import check_ttl
from nat_plugin_evsys.service.http.bounds import check_scope, page_of, parse_as
from nat_plugin_evsys.service.http.context import API, ServiceContext, accepted
from nat_plugin_evsys.service.http.refusals import bad_request, not_found
from nat_plugin_evsys.web.bodies import read_body
from nat_plugin_evsys.web.json_bodies import SMALL, read_json

CHECKPOINT = f"{API}/training_runs/{{run_id}}/checkpoints/{{kind}}/{{name}}"


class _ModelId(BaseModel):
    model_config = ConfigDict(extra="ignore", protected_namespaces=(), strict=True)

    model_id: str = Field(max_length=200)


class _Path(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    tinker_path: str = Field(max_length=4096)


class RunRoutes:
    """The routes of SDK's RestClient, and ``get_info``."""

    def __init__(self, context: ServiceContext) -> None:
        self._context = context
        self._catalog = context.catalog

    def routes(self) -> list[Route]:
        """Starlette's routes."""
        route = self._context.route
        return [
            route("POST", f"{API}/get_info", self._get_info),
            route("POST", f"{API}/weights_info", self._weights_info),
            route("GET", f"{API}/training_runs", self._runs),
            route("GET", f"{API}/training_runs/{{run_id}}", self._run),
            route("GET", f"{API}/training_runs/{{run_id}}/checkpoints", self._run_checkpoints),
            route("GET", f"{API}/checkpoints", self._checkpoints),
            route("DELETE", CHECKPOINT, self._delete),
            route("POST", f"{CHECKPOINT}/publish", self._publish),
            route("DELETE", f"{CHECKPOINT}/publish", self._unpublish),
            route("PUT", f"{CHECKPOINT}/ttl", self._set_ttl),
        ]

    async def _get_info(self, request: Request, owner: str) -> Response:
        _, value = await read_json(request)
        model_id = parse_as(_ModelId, value).model_id
        return JSONResponse(await self._context.read(self._info, model_id, owner))

    def _info(self, model_id: str, owner: str) -> dict[str, Any]:
        """Raises Refusal: 404 there is no such model, or it is another key's."""
        row = self._context.store.model(model_id)
        if row is None or row.owner != owner:
            raise not_found(f"model {model_id!r}")
        self._context.session(row.session_id, owner, for_work=False)
        return self._context.engine.describe(model_id)

    async def _weights_info(self, request: Request, owner: str) -> Response:
        _, value = await read_json(request)
        path = parse_as(_Path, value).tinker_path
        return _json(await asyncio.to_thread(self._catalog.weights_info, path, owner))

    async def _runs(self, request: Request, owner: str) -> Response:
        check_scope(request)
        if "project_id" in request.query_params:
            raise bad_request("project_id is not offered: there are no projects here; leave it out")
        limit, offset = page_of(request, 20)

        def listing() -> dict[str, Any]:
            runs = self._catalog.runs(owner)
            shown = [self._catalog.describe(run, owner) for run in runs[offset : offset + limit]]
            return {"training_runs": _dump(shown), "cursor": _cursor(limit, offset, len(runs))}

        return JSONResponse(await asyncio.to_thread(listing))

    async def _run(self, request: Request, owner: str) -> Response:
        check_scope(request)
        run_id = request.path_params["run_id"]
        return _json(await asyncio.to_thread(lambda: self._catalog.describe(self._catalog.run(run_id, owner), owner)))

    async def _run_checkpoints(self, request: Request, owner: str) -> Response:
        found = await asyncio.to_thread(self._catalog.checkpoints, request.path_params["run_id"], owner)
        return accepted(checkpoints=_dump(found))

    async def _checkpoints(self, request: Request, owner: str) -> Response:
        limit, offset = page_of(request, 100)
        found = await asyncio.to_thread(self._catalog.all_checkpoints, owner)
        shown = _dump(found[offset : offset + limit])
        return accepted(checkpoints=shown, cursor=_cursor(limit, offset, len(found)))

    async def _delete(self, request: Request, owner: str) -> Response:
        path = await self._own(request, owner)
        await asyncio.to_thread(self._catalog.delete, path, owner)
        return accepted(tinker_path=path)

    async def _publish(self, request: Request, owner: str) -> Response:
        await read_body(request, SMALL.bytes)
        path = await self._own(request, owner)
        await asyncio.to_thread(self._catalog.publish, path, owner, True)
        return accepted(tinker_path=path, public=True)

    async def _unpublish(self, request: Request, owner: str) -> Response:
        path = await self._own(request, owner)
        await asyncio.to_thread(self._catalog.publish, path, owner, False)
        return accepted(tinker_path=path, public=False)

    async def _set_ttl(self, request: Request, owner: str) -> Response:
        _, value = await read_json(request)
        if "ttl_seconds" not in value:
            raise bad_request("`ttl_seconds` is missing; give seconds, or null for never")
        seconds = check_ttl(value["ttl_seconds"])
        path = await self._own(request, owner)
        await asyncio.to_thread(self._catalog.set_ttl, path, seconds)
        return accepted(tinker_path=path)

    async def _own(self, request: Request, owner: str) -> str:
        asked = request.path_params
        return await asyncio.to_thread(self._catalog.own, asked["run_id"], asked["kind"], asked["name"], owner)


def _cursor(limit: int, offset: int, total: int) -> dict[str, int]:
    return {"offset": offset, "limit": limit, "total_count": total}


def _dump(models: Sequence[BaseModel]) -> list[dict[str, Any]]:
    return [model.model_dump(mode="json") for model in models]


def _json(model: BaseModel) -> Response:
    return JSONResponse(model.model_dump(mode="json"))
