"""``forward_backward`` requests of the Tinker protocol, from protobuf."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from google.protobuf.message import DecodeError
from tinker import types
from tinker.types.provenance_spans import PromptProvenanceSpan, SampledProvenanceSpan

from nat_plugin_evsys.engine.model.images import IMAGE_FORMATS
from nat_plugin_evsys.errors import WireError
from nat_plugin_evsys.service.proto import tinker_wire_pb2 as wire_pb2
from nat_plugin_evsys.service.wire.scan import check_affordable
from nat_plugin_evsys.service.wire.tensors import INT32, MAX_DENSE, decode_tensor, dense_elements, numbers

_MAX_NAME = 128
"""Characters of a name that may end up in a message to the user."""


@dataclass(frozen=True)
class ForwardBackwardRequest:
    """A decoded ``forward_backward`` or, with ``forward_only``, ``forward`` request."""

    model_id: str
    seq_id: int
    data: list[types.Datum]
    loss_fn: str
    loss_fn_config: dict[str, float | str] | None
    forward_only: bool


def decode_forward_backward(body: bytes) -> ForwardBackwardRequest:
    """The request in a serialized ``ForwardBackwardRequest``. The engine checks the contents of the Datums.

    Raises:
        WireError: it is malformed, or has a chunk that is neither text nor an image; names the part.
    """
    check_affordable(body)
    try:
        message = wire_pb2.ForwardBackwardRequest.FromString(body)
    except DecodeError as exc:
        raise WireError(f"the body is not a ForwardBackwardRequest: {exc}") from exc
    data = [_decode_datum(datum, f"data[{index}]") for index, datum in enumerate(message.data)]
    dense = sum(dense_elements(tensor) for datum in data for tensor in datum.loss_fn_inputs.values())
    if dense > MAX_DENSE:
        raise WireError(f"the sparse tensors of data have {dense} elements once dense; at most {MAX_DENSE} are taken")
    return ForwardBackwardRequest(
        model_id=message.model_id,
        seq_id=message.seq_id,
        data=data,
        loss_fn=_name(message.loss_fn, "loss_fn"),
        loss_fn_config=_decode_config(message),
        forward_only=message.forward_only,
    )


def _decode_datum(message: wire_pb2.Datum, where: str) -> types.Datum:
    chunks = [_decode_chunk(chunk, f"{where}.model_input[{i}]") for i, chunk in enumerate(message.model_input)]
    spans = [
        [_decode_span(span, f"{where}.{name}[{i}]") for i, span in enumerate(getattr(message, name))]
        for name in ("model_input_spans", "loss_fn_input_spans")
    ]
    has_spans = any(spans)
    return types.Datum(
        model_input=types.ModelInput.model_construct(chunks=chunks),
        loss_fn_inputs={
            _name(name, f"{where}.loss_fn_inputs"): decode_tensor(tensor, f"{where}.loss_fn_inputs[{name!r}]")
            for name, tensor in message.loss_fn_inputs.items()
        },
        model_input_spans=spans[0] if has_spans else None,
        loss_fn_input_spans=spans[1] if has_spans else None,
    )


def _decode_chunk(message: wire_pb2.Chunk, where: str) -> types.EncodedTextChunk | types.ImageChunk:
    kind = message.WhichOneof("chunk")
    if kind == "image" and message.image.format in IMAGE_FORMATS:
        return _decode_image(message.image, where)
    if kind != "encoded_text":
        of = f" of format {message.image.format[:_MAX_NAME]!r}" if kind == "image" else ""
        raise WireError(
            f"{where} is {kind or 'empty'}{of}; this server takes text tokens (encoded_text) and png or jpeg images"
        )
    tokens = numbers(message.encoded_text.tokens, INT32, f"{where}.encoded_text.tokens")
    # model_construct: numpy has made sure that all are integers, and checking each again takes longer than the rest
    return types.EncodedTextChunk.model_construct(tokens=tokens.tolist(), type="encoded_text")


def _decode_image(message: wire_pb2.ImageChunk, where: str) -> types.ImageChunk:
    """The engine decodes the file."""
    if message.HasField("override_dimensions"):
        raise WireError(
            f"{where} has override_dimensions, which are not offered; send the image in the size it is to have"
        )
    expected = message.expected_tokens if message.HasField("expected_tokens") else None
    form: Any = message.format
    return types.ImageChunk.model_construct(data=message.data, format=form, expected_tokens=expected, type="image")


def _decode_span(message: wire_pb2.ProvenanceSpan, where: str) -> PromptProvenanceSpan | SampledProvenanceSpan:
    kind = message.WhichOneof("span")
    if kind is None:
        raise WireError(f"{where} is empty; it must be prompt_tokens or sampled_tokens")
    span = getattr(message, kind)
    made = SampledProvenanceSpan if kind == "sampled_tokens" else PromptProvenanceSpan
    try:
        return made(sequence_id=span.sequence_id, offset=span.offset, length=span.length)
    except ValueError as exc:
        raise WireError(f"{where}: {exc}") from exc


def _decode_config(message: wire_pb2.ForwardBackwardRequest) -> dict[str, float | str] | None:
    """``loss_fn_config_v2`` if there is one: it repeats the numbers of the older map."""
    config: dict[str, float | str] = dict(message.loss_fn_config)
    if message.loss_fn_config_v2:
        config = {}
        for name, value in message.loss_fn_config_v2.items():
            kind = value.WhichOneof("value")
            if kind is None:
                raise WireError(f"loss_fn_config_v2[{_name(name, 'a name')!r}] has neither a number nor a text")
            config[name] = _name(value.text, "a text") if kind == "text" else value.number
    for name in config:
        _name(name, "a name of loss_fn_config")
    return config or None


def _name(text: str, where: str) -> str:
    if len(text) > _MAX_NAME:
        raise WireError(f"{where} has {len(text)} characters, from {text[:20]!r} on; at most {_MAX_NAME} are read")
    return text
