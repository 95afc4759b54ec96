"""Decodes the payload of an operation into a request, by its kind."""

from __future__ import annotations

from typing import Any

import orjson
from pydantic import ValidationError

from nat_plugin_evsys.errors import DataError
from nat_plugin_evsys.service.wire.forward_backward import ForwardBackwardRequest, decode_forward_backward
from nat_plugin_evsys.service.wire.kinds import OperationKind
from nat_plugin_evsys.service.wire.requests import (
    CreateModel,
    LoadWeights,
    OptimStep,
    RequestBody,
    Sample,
    SaveWeights,
)

Request = RequestBody | ForwardBackwardRequest

_BODIES: dict[OperationKind, type[RequestBody]] = {
    OperationKind.CREATE_MODEL: CreateModel,
    OperationKind.OPTIM_STEP: OptimStep,
    OperationKind.SAVE_WEIGHTS: SaveWeights,
    OperationKind.SAVE_WEIGHTS_FOR_SAMPLER: SaveWeights,
    OperationKind.SAVE_WEIGHTS_EXTERNAL: SaveWeights,
    OperationKind.LOAD_WEIGHTS: LoadWeights,
    OperationKind.SAMPLE: Sample,
}


def decode(kind: OperationKind, payload: bytes, value: dict[str, Any] | None = None) -> Request:
    """The request in a payload.

    Args:
        value: the JSON object in the payload, if it is already parsed.

    Raises:
        DataError: it is malformed; the first wrong field is named.
    """
    if kind == OperationKind.FORWARD_BACKWARD:
        return decode_forward_backward(payload)
    try:
        return _BODIES[kind].model_validate(orjson.loads(payload) if value is None else value)
    except orjson.JSONDecodeError as exc:
        raise DataError(f"the request is malformed: it is not JSON: {exc}") from exc
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DataError(f"the request is malformed: {where + ': ' if where else ''}{first['msg']}") from exc
