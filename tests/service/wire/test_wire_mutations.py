"""Whatever bytes come, decoding gives a request or a WireError."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tinker.types.forward_backward_request import ForwardBackwardRequest
from wire_strategies import requests, serialized

from nat_plugin_evsys.errors import WireError
from nat_plugin_evsys.service.proto import tinker_wire_pb2 as wire_pb2
from nat_plugin_evsys.service.wire.forward_backward import decode_forward_backward
from nat_plugin_evsys.service.wire.scan import forward_backward_address

EDITS = st.lists(st.tuples(st.sampled_from(["set", "insert", "delete", "cut", "copy"]), st.integers(0), st.binary()))


def edited(body: bytes, edits: list[tuple[str, int, bytes]]) -> bytes:
    for how, where, what in edits:
        at = where % (len(body) + 1)
        if how == "set":
            body = body[:at] + what + body[at + len(what) :]
        elif how == "insert":
            body = body[:at] + what + body[at:]
        elif how == "delete":
            body = body[:at] + body[at + len(what) :]
        elif how == "copy":
            body = body[:at] + body[at // 2 : at] + body[at:]
        else:
            body = body[:at]
    return body


def check(body: bytes) -> bool:
    """Whether it decodes. Anything but a WireError fails the test."""
    try:
        decoded = decode_forward_backward(body)
    except WireError:
        return False
    assert forward_backward_address(body) == (decoded.model_id, decoded.seq_id)
    for datum in decoded.data:  # what decodes, the engine can make tensors of
        assert isinstance(datum.model_input.to_ints(), list)
        for tensor in datum.loss_fn_inputs.values():
            assert list(tensor.to_torch().shape) == tensor.shape
    return True


@settings(max_examples=150, deadline=None)
@given(requests, EDITS)
def test_edited_requests(request: ForwardBackwardRequest, edits: list[tuple[str, int, bytes]]) -> None:
    check(edited(serialized(request), edits))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
@example(b"\x0a\x02\xff\xfe")
@example(b"\x0b\x0b\x0b\x0c\x0c\x0c")
@example(b"\x08" + b"\xff" * 12)
@example(b"\x1a\xff\xff\xff\xff\x7f")
def test_any_bytes(body: bytes) -> None:
    check(body)


_SMALL = st.integers(-2, 6)
_BYTES = st.one_of(
    st.binary(max_size=33),
    st.lists(_SMALL, max_size=5).map(lambda v: b"".join(i.to_bytes(8, "little", signed=True) for i in v)),
)
_TENSORS: st.SearchStrategy[Any] = st.builds(
    lambda dtype, shape, dense, sparse: wire_pb2.Tensor(
        dtype=dtype, shape=shape, **({"dense": dense} if sparse is None else {"sparse_csr": sparse})
    ),
    st.integers(0, 5),
    st.lists(st.one_of(_SMALL, st.integers(-(2**63), 2**63 - 1)), max_size=4),
    _BYTES,
    st.one_of(st.none(), st.builds(wire_pb2.SparseCsr, values=_BYTES, crow_indices=_BYTES, col_indices=_BYTES)),
)


@settings(max_examples=250, deadline=None)
@given(st.lists(st.dictionaries(st.text(max_size=3), _TENSORS, max_size=3), max_size=3))
def test_any_tensors(data: list[dict[str, Any]]) -> None:
    message = wire_pb2.ForwardBackwardRequest(model_id="m", seq_id=1)
    for inputs in data:
        datum = message.data.add()
        for name, tensor in inputs.items():
            datum.loss_fn_inputs[name].CopyFrom(tensor)
    check(message.SerializeToString())


def test_a_cut_request_is_refused_wherever_a_length_is_missed() -> None:
    body = wire_pb2.ForwardBackwardRequest(
        model_id="model", data=[wire_pb2.Datum(model_input=[{"encoded_text": {"tokens": bytes(16)}}])]
    ).SerializeToString()
    assert check(body)
    refused = [not check(body[:length]) for length in range(1, len(body))]
    assert sum(refused) >= len(body) - 3
    with pytest.raises(WireError, match="cut off"):
        decode_forward_backward(body[:-1])
