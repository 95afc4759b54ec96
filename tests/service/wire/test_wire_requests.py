"""What the SDK sends is what the server reads."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tinker import types
from tinker.proto import tinker_public_pb2 as sdk_pb2
from tinker.types.forward_backward_request import ForwardBackwardRequest
from wire_strategies import INT32, requests, serialized

from nat_plugin_evsys.errors import WireError
from nat_plugin_evsys.service.proto import tinker_wire_pb2 as wire_pb2
from nat_plugin_evsys.service.wire import scan as wire_scan
from nat_plugin_evsys.service.wire.forward_backward import decode_forward_backward
from nat_plugin_evsys.service.wire.scan import forward_backward_address


def facts(tensor: types.TensorData) -> tuple[Any, ...]:
    """A TensorData as something that == compares, NaN included."""
    values = tensor._numpy
    shape = list(values.shape) if tensor.shape is None else tensor.shape
    return (
        tensor.dtype,
        shape,
        values.dtype,
        values.tobytes(),
        tensor.sparse_crow_indices,
        tensor.sparse_col_indices,
    )


@settings(max_examples=120, deadline=None)
@given(requests)
def test_the_sdk_s_request_comes_back(request: ForwardBackwardRequest) -> None:
    body = serialized(request)
    decoded = decode_forward_backward(body)
    sent = request.forward_backward_input

    assert (decoded.model_id, decoded.seq_id, decoded.loss_fn) == (request.model_id, request.seq_id, sent.loss_fn)
    assert forward_backward_address(body) == (request.model_id, request.seq_id)
    config = {name: v if isinstance(v, str) else float(v) for name, v in (sent.loss_fn_config or {}).items()}
    assert repr(sorted((decoded.loss_fn_config or {}).items())) == repr(sorted(config.items()))
    assert len(decoded.data) == len(sent.data)
    for got, expected in zip(decoded.data, sent.data, strict=True):
        assert got.model_input == expected.model_input
        assert (got.model_input_spans, got.loss_fn_input_spans) == (
            expected.model_input_spans,
            expected.loss_fn_input_spans,
        )
        assert {k: facts(v) for k, v in got.loss_fn_inputs.items()} == {
            k: facts(v) for k, v in expected.loss_fn_inputs.items()
        }


def test_forward_only_is_read() -> None:
    message = wire_pb2.ForwardBackwardRequest(model_id="m", seq_id=3, forward_only=True)
    assert decode_forward_backward(message.SerializeToString()).forward_only
    message.forward_only = False
    assert not decode_forward_backward(message.SerializeToString()).forward_only


def test_the_older_config_is_read_where_there_is_no_newer() -> None:
    message = wire_pb2.ForwardBackwardRequest(loss_fn_config={"beta": 0.5})
    assert decode_forward_backward(message.SerializeToString()).loss_fn_config == {"beta": 0.5}


def test_int32_and_bfloat16_are_widened() -> None:
    datum = wire_pb2.Datum()
    half = datum.loss_fn_inputs["half"]
    half.dtype, half.dense = wire_pb2.DTYPE_BFLOAT16, np.array([0x3FC0, 0xC000], dtype="<u2").tobytes()
    small = datum.loss_fn_inputs["small"]
    small.dtype, small.dense = wire_pb2.DTYPE_INT32, np.array([-7, 8], dtype="<i4").tobytes()
    inputs = (
        decode_forward_backward(wire_pb2.ForwardBackwardRequest(data=[datum]).SerializeToString())
        .data[0]
        .loss_fn_inputs
    )
    assert (inputs["half"].dtype, inputs["half"].data) == ("float32", [1.5, -2.0])
    assert (inputs["small"].dtype, inputs["small"].data) == ("int64", [-7, 8])


def test_the_schema_is_the_sdk_s() -> None:
    """Every message and enum of the SDK: the same fields, numbers, types and presence."""

    def shape(file: Any) -> dict[str, Any]:
        found: dict[str, Any] = {name: dict(e.values_by_name) for name, e in file.enum_types_by_name.items()}
        found = {name: {key: v.number for key, v in values.items()} for name, values in found.items()}
        pending = list(file.message_types_by_name.values())
        while pending:
            message = pending.pop()
            pending.extend(message.nested_types)
            found[message.full_name.removeprefix(f"{file.package}.")] = {
                field.name: (
                    field.number,
                    field.type,
                    field.is_repeated,
                    field.has_presence,
                    field.message_type and field.message_type.name,
                    field.containing_oneof and field.containing_oneof.name,
                )
                for field in message.fields
            }
        return found

    ours, theirs = shape(wire_pb2.DESCRIPTOR), shape(sdk_pb2.DESCRIPTOR)
    assert len(ours) >= 25
    assert ours == theirs


def tensor(**fields: Any) -> wire_pb2.ForwardBackwardRequest:
    datum = wire_pb2.Datum()
    datum.loss_fn_inputs["weights"].MergeFrom(wire_pb2.Tensor(**fields))
    return wire_pb2.ForwardBackwardRequest(data=[datum])


def csr(values: int, crow: list[int], col: list[int], shape: list[int]) -> wire_pb2.ForwardBackwardRequest:
    sparse = wire_pb2.SparseCsr(
        values=bytes(4 * values),
        crow_indices=np.array(crow, dtype="<i8").tobytes(),
        col_indices=np.array(col, dtype="<i8").tobytes(),
    )
    return tensor(sparse_csr=sparse, dtype=1, shape=shape)


def chunk(**fields: Any) -> wire_pb2.ForwardBackwardRequest:
    return wire_pb2.ForwardBackwardRequest(data=[wire_pb2.Datum(), wire_pb2.Datum(model_input=[fields])])


def spans(*spans: Any) -> wire_pb2.ForwardBackwardRequest:
    return wire_pb2.ForwardBackwardRequest(data=[wire_pb2.Datum(model_input_spans=spans)])


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (chunk(encoded_text={"tokens": b"12345"}), r"data\[1\].model_input\[0\].encoded_text.tokens has 5 bytes"),
        (chunk(image={"data": b"x"}), r"data\[1\].model_input\[0\] is image.*text tokens"),
        (chunk(), "is empty.*text tokens"),
        (tensor(dense=bytes(8), dtype=0), r"loss_fn_inputs\['weights'\].dtype is 0"),
        (tensor(dense=bytes(8), dtype=77), "dtype is 77"),
        (tensor(dense=bytes(6), dtype=1), "has 6 bytes"),
        (tensor(dtype=1, shape=[2]), "neither dense nor sparse"),
        (tensor(dense=bytes(8), dtype=1, shape=[3]), "has 2 values, but its shape is"),
        (tensor(dense=bytes(8), dtype=1, shape=[-1, -2]), "never negative"),
        (tensor(dense=b"", dtype=1, shape=[0, 2**62, 2**62]), "cannot have the shape"),
        (tensor(dense=b"", dtype=1, shape=[2**62] * 1_000_000), "1000000 sizes"),
        (csr(1, [0, 1], [0], [1]), "two sizes"),
        (csr(2, [0, 1], [0], [1, 1]), "2 values, but 1 col_indices"),
        (csr(1, [0, 1, 1], [0], [1, 1]), "do not divide"),
        (csr(2, [0, 2, 1, 2], [0, 0], [3, 1]), "do not divide"),
        (csr(1, [0, 1], [1], [1, 1]), "from 0 to 0"),
        (csr(1, [0, 1], [-1], [1, 1]), "from 0 to 0"),
        (csr(3, [0, 3], [0, 2, 1], [1, 4]), r"col_indices\[2\] is not above"),
        (csr(2, [0, 2], [1, 1], [1, 4]), r"col_indices\[1\] is not above"),
        (csr(1, [0, 1], [0], [1, 2**40]), "elements once dense"),
        (spans({}), r"model_input_spans\[0\] is empty"),
        (spans({"prompt_tokens": {"sequence_id": "s", "length": -1}}), "length must be >= 0"),
        (wire_pb2.ForwardBackwardRequest(loss_fn="x" * 999), "999 characters"),
        (wire_pb2.ForwardBackwardRequest(loss_fn_config={"x" * 999: 1.0}), "999 characters"),
        (wire_pb2.ForwardBackwardRequest(loss_fn_config_v2={"a": {}}), "neither a number nor a text"),
    ],
)
def test_what_is_malformed_is_named(message: wire_pb2.ForwardBackwardRequest, says: str) -> None:
    began = time.monotonic()
    with pytest.raises(WireError, match=says) as caught:
        decode_forward_backward(message.SerializeToString())
    assert len(str(caught.value)) < 500
    assert time.monotonic() - began < 5


def test_rows_of_a_sparse_tensor_may_each_begin_anew() -> None:
    message = csr(3, [0, 2, 2, 3], [0, 3, 1], [3, 4])
    got = decode_forward_backward(message.SerializeToString()).data[0].loss_fn_inputs["weights"]
    assert got.to_torch().shape == (3, 4)


def test_a_small_body_cannot_ask_for_much_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WireError, match="more than 1000000 Datums"):
        decode_forward_backward(b"\x1a\x00" * 1_000_001)
    with pytest.raises(WireError, match="more than 1000000 Datums"):
        forward_backward_address(b"\x1a\x00" * 1_000_001)
    with pytest.raises(WireError, match="fields beside its data"):
        forward_backward_address(b"\x2a\x00" * 10_001)
    assert forward_backward_address(b"\x2a\x00" * 10_000) == ("", 0)
    monkeypatch.setattr(wire_scan, "MAX_FIELDS", 1000)
    message = wire_pb2.ForwardBackwardRequest(data=[wire_pb2.Datum(model_input=[{}] * 300)] * 4)
    with pytest.raises(WireError, match="more than 1000 chunks"):
        decode_forward_backward(message.SerializeToString())


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=5), INT32, st.binary(max_size=20))
def test_the_last_address_counts_and_unknown_fields_do_not(model_id: str, seq_id: int, extra: bytes) -> None:
    unknown = b"\xa2\x06" + bytes([len(extra)]) + extra  # field 100
    first = wire_pb2.ForwardBackwardRequest(model_id="first", seq_id=-5).SerializeToString()
    last = wire_pb2.ForwardBackwardRequest(model_id=model_id, seq_id=seq_id).SerializeToString()
    body = first + unknown + last
    decoded = decode_forward_backward(body)
    assert forward_backward_address(body) == (decoded.model_id, decoded.seq_id)
