"""The server's log: one line per request and other events, as text or JSON on stderr."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
import uuid
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import unquote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nat_plugin_evsys.config.serve import KEY_PREFIX
from nat_plugin_evsys.json_lines import json_line

if TYPE_CHECKING:
    from nat_plugin_evsys.service.http.prometheus import ServiceMetrics

REQUEST_ID_HEADER = "x-request-id"

OWNER, ROUTE = "evsys.owner", "evsys.route"
"""Where the routes note in the ASGI scope who asked and which route answered."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:+/=-]{1,128}")

_KEY = re.compile(rf"({KEY_PREFIX}|sk-)[^/]*", re.IGNORECASE)
_MAX_PATH = 500

access = logging.getLogger("nat_plugin_evsys.service.work.access")


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, logger, message, the fields of ``extra={"fields": …}``, exception."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json_line(line).rstrip()


class TextFormatter(logging.Formatter):
    """``time level message key=value …``."""

    def format(self, record: logging.LogRecord) -> str:
        """The line (and a traceback below it)."""
        stamp = time.strftime("%H:%M:%S", time.localtime(record.created))
        fields = "".join(f" {name}={_shown(value)}" for name, value in getattr(record, "fields", {}).items())
        text = f"{stamp} {record.levelname:<7} {record.getMessage()}{fields}"
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


def _shown(value: Any) -> str:
    text = str(value)
    return text if text and text.isprintable() and " " not in text else json.dumps(text)


def setup_logging(log_format: Literal["text", "json"]) -> None:
    """Send the log of this process to stderr in that form."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("nat_plugin_evsys").setLevel(logging.INFO)


class AccessLog:
    """ASGI middleware: a request id in and out, a log line and the metrics of every request.

    Never logs headers, bodies or query strings (they hold signatures), nor anything in a path that looks like a key.
    """

    def __init__(self, app: ASGIApp, metrics: ServiceMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        started = time.perf_counter()
        status = 0

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (REQUEST_ID_HEADER.encode(), request_id.encode())]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            self._note(scope, request_id, status or 499, time.perf_counter() - started)

    def _note(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
        route = scope.get(ROUTE, "unmatched")
        self._metrics.request(route, scope["method"], status, seconds)
        fields = {
            "request_id": request_id,
            "method": scope["method"],
            "path": without_keys(unquote(scope["path"]))[:_MAX_PATH],
            "status": status,
            "ms": round(seconds * 1000, 1),
            "owner": scope.get(OWNER, "-"),
        }
        access.info("request", extra={"fields": fields})


def without_keys(text: str) -> str:
    """The text without anything that looks like an API key: people put keys where they do not belong."""
    return _KEY.sub(r"\1…", text)


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == REQUEST_ID_HEADER.encode():
            given: str = value.decode("latin-1")
            if _REQUEST_ID.fullmatch(given) and without_keys(given) == given:
                return given
    return uuid.uuid4().hex
