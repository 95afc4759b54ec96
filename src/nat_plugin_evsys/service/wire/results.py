"""Results of ``forward_backward`` and of sampling as protobuf."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from tinker import types

from nat_plugin_evsys.errors import WireError
from nat_plugin_evsys.service.proto import tinker_wire_pb2 as wire_pb2
from nat_plugin_evsys.service.wire.tensors import FLOAT32, INT32, INT64, encode_tensor, encode_topk, joined, to_bytes

_STOP_REASONS = {"stop": wire_pb2.STOP_REASON_STOP, "length": wire_pb2.STOP_REASON_LENGTH}


def encode_forward_backward(output: types.ForwardBackwardOutput) -> bytes:
    """Serialized ``ForwardBackwardOutput``: one ``ArrayRecord`` for each run of Datums with equal trailing shapes.

    Raises:
        WireError: Datums have different fields, or a field has different dtypes.
    """
    message = wire_pb2.ForwardBackwardOutput(
        loss_fn_output_type=output.loss_fn_output_type,
        metrics={name: float(value) for name, value in output.metrics.items()},
    )
    outputs = output.loss_fn_outputs
    layouts = [_layout(datum) for datum in outputs]
    for index, layout in enumerate(layouts):
        if layout != layouts[0]:
            raise WireError(f"loss_fn_outputs[{index}] has the fields {layout}, but the first has {layouts[0]}")
    for _, group in groupby(outputs, key=_trailing_shapes):
        message.loss_fn_outputs.append(_encode_record(list(group), output.loss_fn_output_type))
    body: bytes = message.SerializeToString()
    return body


def encode_sample(response: types.SampleResponse) -> bytes:
    """Serialized ``SampleResponse``; what is None in ``response`` was not requested and is left out."""
    message = wire_pb2.SampleResponse(
        sequences=[_encode_sequence(sequence) for sequence in response.sequences],
        prompt_cache_hit_tokens=response.prompt_cache_hit_tokens,
    )
    if response.prompt_logprobs_np is not None:
        message.prompt_logprobs = to_bytes(response.prompt_logprobs_np, FLOAT32)
    if response.topk_prompt_logprobs_np is not None:
        message.topk_prompt_logprobs.CopyFrom(encode_topk(response.topk_prompt_logprobs_np))
    if response.target_prompt_logprobs is not None:
        message.target_prompt_logprobs.CopyFrom(encode_tensor(response.target_prompt_logprobs))
    if response.prompt_alt_tokens is not None:
        message.prompt_alt_tokens.tokens.CopyFrom(encode_tensor(response.prompt_alt_tokens.tokens))
        message.prompt_alt_tokens.logprobs.CopyFrom(encode_tensor(response.prompt_alt_tokens.logprobs))
    body: bytes = message.SerializeToString()
    return body


def _layout(datum: types.LossFnOutput) -> dict[str, str]:
    return {name: tensor.dtype for name, tensor in datum.items()}


def _trailing_shapes(datum: types.LossFnOutput) -> dict[str, tuple[int, ...]]:
    return {name: tensor.to_numpy().shape[1:] for name, tensor in datum.items()}


def _encode_record(datums: Sequence[types.LossFnOutput], type_tag: str) -> wire_pb2.ArrayRecord:
    record = wire_pb2.ArrayRecord(type_tag=type_tag, num_datums=len(datums))
    for name, first in datums[0].items():
        wide = INT64 if first.dtype == "int64" else FLOAT32
        data, offsets = joined([datum[name].to_numpy() for datum in datums], wide)
        field = record.fields[name]
        field.data, field.offsets = data, offsets
        field.dtype = wire_pb2.DTYPE_INT64 if wide is INT64 else wire_pb2.DTYPE_FLOAT32
        field.trailing_shape.extend(first.to_numpy().shape[1:])
    return record


def _encode_sequence(sequence: types.SampledSequence) -> wire_pb2.SampledSequence:
    tokens = sequence.tokens if sequence.tokens_np is None else sequence.tokens_np
    logprobs = sequence.logprobs if sequence.logprobs_np is None else sequence.logprobs_np
    message = wire_pb2.SampledSequence(stop_reason=_STOP_REASONS[sequence.stop_reason], tokens=to_bytes(tokens, INT32))
    if logprobs is not None:
        message.logprobs = to_bytes(logprobs, FLOAT32)
    if sequence.topk_logprobs_np is not None:
        message.topk_sampled_logprobs.CopyFrom(encode_topk(sequence.topk_logprobs_np))
    return message
