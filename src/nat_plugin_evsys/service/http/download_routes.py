"""Downloads of weights: by signed URLs, which are fetched without a key."""

from __future__ import annotations

import asyncio
import tarfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from email.utils import formatdate
from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, Response, StreamingResponse
from starlette.routing import Route

from nat_plugin_evsys.engine.model.peft_format import ADAPTER, ADAPTER_CONFIG
from nat_plugin_evsys.errors import Refusal
from nat_plugin_evsys.runtime.checkpoint_store import SCHEME, SEGMENTS
from nat_plugin_evsys.service.http.context import API, ServiceContext, accepted
from nat_plugin_evsys.service.http.refusals import not_found
from nat_plugin_evsys.service.http.run_routes import CHECKPOINT
from nat_plugin_evsys.service.http.signing import VALID_SECONDS, UrlSigner
from nat_plugin_evsys.web.listen import url_of

FILES = (ADAPTER_CONFIG, ADAPTER)
"""What a download has: a PEFT directory."""

ARCHIVE = "archive.tar"

_CHUNK = 1 << 20


class DownloadRoutes:
    """``external_weights_urls``, the archive URL of SDK 0.35 and older, and what both point to."""

    def __init__(self, context: ServiceContext) -> None:
        self._context = context
        self._signer = UrlSigner()

    def routes(self) -> list[Route]:
        """Starlette's routes."""
        route = self._context.route
        return [
            route("GET", f"{CHECKPOINT}/external_weights_urls", self._urls),
            route("GET", f"{CHECKPOINT}/archive", self._archive_url),
            route("GET", f"{API}/downloads/{{run_id}}/{{kind}}/{{name}}/{{file}}", self._download, public=True),
        ]

    async def _urls(self, request: Request, owner: str) -> Response:
        kind = request.path_params["kind"]
        if kind != SEGMENTS["external"]:
            raise Refusal(
                400, f"only {SEGMENTS['external']} are downloaded by URLs, not {kind[:40]!r}; see save_weights_external"
            )
        expires = int(time.time()) + VALID_SECONDS
        urls = {file: await self._sign(request, owner, file, expires) for file in FILES}
        return accepted(urls=urls, expires=datetime.fromtimestamp(expires, UTC).isoformat())

    async def _archive_url(self, request: Request, owner: str) -> Response:
        expires = int(time.time()) + VALID_SECONDS
        url = await self._sign(request, owner, ARCHIVE, expires)
        return Response(status_code=302, headers={"location": url, "expires": formatdate(expires, usegmt=True)})

    async def _sign(self, request: Request, owner: str, file: str, expires: int) -> str:
        asked = request.path_params
        run_id, kind, name = asked["run_id"], asked["kind"], asked["name"]
        await asyncio.to_thread(self._context.catalog.own, run_id, kind, name, owner)
        path = f"{API}/downloads/{run_id}/{kind}/{name}/{file}"
        return self._origin(request) + self._signer.sign(path, expires)

    def _origin(self, request: Request) -> str:
        """Where clients reach this server. Not taken from the Host header, which anybody can forge."""
        return self._context.config.public_url or url_of(*request.scope["server"])

    async def _download(self, request: Request, owner: str) -> Response:
        query, asked = request.query_params, request.path_params
        run_id, kind, name, file = asked["run_id"], asked["kind"], asked["name"], asked["file"]
        path = f"{API}/downloads/{run_id}/{kind}/{name}/{file}"
        self._signer.check(path, query.get("expires", ""), query.get("signature", ""))
        directory = await asyncio.to_thread(self._context.checkpoints.resolve, f"{SCHEME}{run_id}/{kind}/{name}")
        files = FILES if file == ARCHIVE else (file,)
        if not set(files) <= set(FILES) or not all((directory / each).is_file() for each in files):
            raise not_found(f"file {file[:64]!r} of that checkpoint")
        if file == ARCHIVE:
            return StreamingResponse(_tar([directory / each for each in files]), media_type="application/x-tar")
        return FileResponse(directory / file, media_type="application/octet-stream", filename=file)


def _tar(files: list[Path]) -> Iterator[bytes]:
    """The files as an uncompressed tar archive, piece by piece."""
    for path in files:
        with path.open("rb") as file:
            entry = tarfile.TarInfo(path.name)
            entry.size = path.stat().st_size
            yield entry.tobuf(tarfile.GNU_FORMAT)
            while chunk := file.read(_CHUNK):
                yield chunk
        yield b"\0" * (-entry.size % tarfile.BLOCKSIZE)
    yield b"\0" * (2 * tarfile.BLOCKSIZE)
