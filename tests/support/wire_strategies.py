"""Hypothesis strategies for what the SDK sends."""

from __future__ import annotations

from typing import Literal

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from tinker import types
from tinker.proto.request_conv import forward_backward_request_to_proto
from tinker.types.forward_backward_input import ForwardBackwardInput
from tinker.types.forward_backward_request import ForwardBackwardRequest
from tinker.types.provenance_spans import PromptProvenanceSpan, SampledProvenanceSpan

INT32 = st.integers(-(2**31), 2**31 - 1)
NAMES = st.text(max_size=8)
DTYPES: dict[Literal["float32", "int64"], type[np.float32 | np.int64]] = {"float32": np.float32, "int64": np.int64}


@st.composite
def dense_tensors(draw: st.DrawFn) -> types.TensorData:
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    shape = draw(st.one_of(st.tuples(st.integers(0, 5)), st.tuples(st.integers(0, 4), st.integers(0, 4))))
    values = draw(arrays.arrays(DTYPES[dtype], shape))
    given = None if len(shape) == 1 and draw(st.booleans()) else list(shape)
    return types.TensorData(data=values, dtype=dtype, shape=given)


@st.composite
def sparse_tensors(draw: st.DrawFn) -> types.TensorData:
    rows, columns = draw(st.integers(0, 4)), draw(st.integers(0, 4))
    kept = draw(arrays.arrays(np.bool_, (rows, columns)))
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    return types.TensorData(
        data=draw(arrays.arrays(DTYPES[dtype], int(kept.sum()))),
        dtype=dtype,
        shape=[rows, columns],
        sparse_crow_indices=[0, *np.cumsum(kept.sum(axis=1)).tolist()],
        sparse_col_indices=np.nonzero(kept)[1].tolist(),
    )


tensors = st.one_of(dense_tensors(), sparse_tensors())


def _spans() -> st.SearchStrategy[list[PromptProvenanceSpan | SampledProvenanceSpan]]:
    facts = {"sequence_id": st.text(min_size=1, max_size=5), "offset": st.integers(0, 9), "length": st.integers(0, 9)}
    kinds = st.one_of(st.builds(PromptProvenanceSpan, **facts), st.builds(SampledProvenanceSpan, **facts))
    return st.lists(kinds, min_size=1, max_size=3)


@st.composite
def datums(draw: st.DrawFn) -> types.Datum:
    chunks = draw(st.lists(st.lists(INT32, max_size=6), max_size=3))
    spans = draw(st.one_of(st.none(), st.tuples(_spans(), _spans())))
    return types.Datum(
        model_input=types.ModelInput(chunks=[types.EncodedTextChunk(tokens=tokens) for tokens in chunks]),
        loss_fn_inputs=draw(st.dictionaries(NAMES, tensors, max_size=3)),
        model_input_spans=spans[0] if spans else None,
        loss_fn_input_spans=spans[1] if spans else None,
    )


requests = st.builds(
    ForwardBackwardRequest,
    forward_backward_input=st.builds(
        ForwardBackwardInput,
        data=st.lists(datums(), max_size=4),
        loss_fn=st.sampled_from(["cross_entropy", "ppo", "custom", "no such loss"]),
        loss_fn_config=st.one_of(
            st.none(), st.dictionaries(NAMES, st.one_of(st.floats(), st.integers(-9, 9), NAMES), max_size=3)
        ),
    ),
    model_id=NAMES,
    seq_id=INT32,
)


def serialized(request: ForwardBackwardRequest) -> bytes:
    """What the SDK posts."""
    body: bytes = forward_backward_request_to_proto(request).SerializeToString()
    return body
