"""Limits of single fields: numbers that fit a column, pages of a listing."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from nat_plugin_evsys.service.http.refusals import bad_request

M = TypeVar("M", bound=BaseModel)

_SCOPES = ("owned", "accessible")

MAX_PAGE = 1000


def parse_as(model: type[M], value: dict[str, Any]) -> M:
    """The fields of ``model`` in a JSON object; unknown ones (of a newer SDK) are ignored.

    Raises:
        Refusal: 400 that names the first wrong field.
    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise bad_request(f"`{where}`: {first['msg']}" if where else first["msg"]) from error


def page_of(request: Request, default: int) -> tuple[int, int]:
    """``(limit, offset)`` of a listing.

    Raises:
        Refusal: 400 unless both are whole numbers in range.
    """
    limit = _whole(request, "limit", default)
    offset = _whole(request, "offset", 0)
    if limit < 1:
        raise bad_request("limit must be at least 1")
    return min(limit, MAX_PAGE), offset


def check_scope(request: Request) -> None:
    """Raises Refusal, 400, unless ``access_scope`` is one that the SDK knows."""
    scope = request.query_params.get("access_scope", "owned")
    if scope not in _SCOPES:
        raise bad_request(f"access_scope must be owned or accessible (the same here), got {scope[:40]!r}")


def _whole(request: Request, name: str, default: int) -> int:
    text = request.query_params.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdecimal()) or len(text) > 15:
        raise bad_request(f"{name} must be a whole number, got {text[:40]!r}")
    return int(text)
