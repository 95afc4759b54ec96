"""What the server answers is what the SDK reads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from tinker import types
from tinker.proto.response_conv import deserialize_forward_backward_output, deserialize_sample_response
from tinker.types.prompt_alt_tokens import PromptAltTokens
from tinker.types.topk_logprobs import MASK_LOGPROB, TopkLogprobs
from wire_strategies import DTYPES, NAMES

from nat_plugin_evsys.errors import WireError
from nat_plugin_evsys.service.wire.results import encode_forward_backward, encode_sample


@st.composite
def outputs(draw: st.DrawFn) -> types.ForwardBackwardOutput:
    """Datums of equal fields, and any lengths and widths."""
    dtypes = draw(st.dictionaries(NAMES, st.sampled_from(sorted(DTYPES)), max_size=3))
    datums = []
    for _ in range(draw(st.integers(0, 5))):
        shape = draw(st.sampled_from([(0,), (3,), (2, 2), (3, 2), (2, 3, 1)]))
        datums.append(
            {name: types.TensorData.from_numpy(draw(arrays.arrays(DTYPES[d], shape))) for name, d in dtypes.items()}
        )
    metrics = draw(st.dictionaries(NAMES, st.floats(), max_size=3))
    return types.ForwardBackwardOutput("TorchLossReturn", datums, metrics)


@settings(max_examples=120, deadline=None)
@given(outputs())
def test_the_sdk_reads_the_output_of_forward_backward(output: types.ForwardBackwardOutput) -> None:
    got = deserialize_forward_backward_output(encode_forward_backward(output))
    assert got.loss_fn_output_type == output.loss_fn_output_type
    assert repr(sorted(got.metrics.items())) == repr(sorted(output.metrics.items()))
    assert len(got.loss_fn_outputs) == len(output.loss_fn_outputs)
    for mine, theirs in zip(output.loss_fn_outputs, got.loss_fn_outputs, strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine:
            assert (theirs[name].dtype, theirs[name].shape) == (mine[name].dtype, mine[name].shape)
            assert theirs[name].to_numpy().tobytes() == mine[name].to_numpy().tobytes()


def test_an_engine_s_output_in_any_layout() -> None:
    """Tensors that are views, and a scalar loss."""
    matrix = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    output = types.ForwardBackwardOutput(
        "TorchLossReturn",
        [
            {"logprobs": types.TensorData.from_numpy(matrix.numpy().T)},
            {"logprobs": types.TensorData.from_torch(matrix)},
        ],
        {"loss:sum": 1.5},
    )
    first, second = deserialize_forward_backward_output(encode_forward_backward(output)).loss_fn_outputs
    assert torch.equal(first["logprobs"].to_torch(), matrix.T)
    assert torch.equal(second["logprobs"].to_torch(), matrix)


@pytest.mark.parametrize("second", [{}, {"loss": "int64"}, {"loss": "float32", "logprobs": "float32"}])
def test_datums_of_different_fields_are_refused(second: dict[str, str]) -> None:
    """The SDK would give one Datum's values to another."""
    datums = [{"loss": types.TensorData(data=[1.0], dtype="float32")}]
    datums.append({name: types.TensorData(data=[1], dtype=dtype) for name, dtype in second.items()})
    with pytest.raises(WireError, match=r"loss_fn_outputs\[1\]"):
        encode_forward_backward(types.ForwardBackwardOutput("x", datums, {}))


def topk(draw: st.DrawFn, length: int) -> TopkLogprobs:
    k = draw(st.integers(1, 3))
    ids = draw(arrays.arrays(np.int32, (length, k)))
    return TopkLogprobs(ids, np.full((length, k), MASK_LOGPROB, np.float32) if k == 2 else ids.astype(np.float32))


@st.composite
def samples(draw: st.DrawFn) -> types.SampleResponse:
    sequences = []
    for index in range(draw(st.integers(0, 3))):
        length = draw(st.integers(1, 5))
        sequences.append(
            types.SampledSequence(
                stop_reason=draw(st.sampled_from(["stop", "length"])),
                sequence_id=str(index),
                tokens_np=draw(arrays.arrays(np.int32, length)),
                logprobs_np=draw(st.one_of(st.none(), arrays.arrays(np.float32, length))),
                topk_logprobs_np=topk(draw, length) if draw(st.booleans()) else None,
            )
        )
    prompt = draw(st.integers(2, 5))
    target = types.TensorData.from_numpy(draw(arrays.arrays(np.float32, (prompt - 1, 2))))
    ids = types.TensorData.from_numpy(draw(arrays.arrays(np.int64, (prompt - 1, 2))))
    return types.SampleResponse(
        sequences=sequences,
        prompt_logprobs_np=draw(st.one_of(st.none(), arrays.arrays(np.float32, prompt))),
        topk_prompt_logprobs_np=topk(draw, prompt) if draw(st.booleans()) else None,
        target_prompt_logprobs=target if draw(st.booleans()) else None,
        prompt_alt_tokens=PromptAltTokens(tokens=ids, logprobs=target) if draw(st.booleans()) else None,
        prompt_cache_hit_tokens=draw(st.integers(0, 2**31 - 1)),
    )


def raw(value: object) -> object:
    """Something that == compares: arrays by their bytes."""
    if isinstance(value, types.TensorData):
        return value.dtype, value.shape, value.to_numpy().tobytes()
    if isinstance(value, TopkLogprobs):
        return raw(value.token_ids), raw(value.logprobs)
    if isinstance(value, PromptAltTokens):
        return raw(value.tokens), raw(value.logprobs)
    return (value.dtype, value.shape, value.tobytes()) if isinstance(value, np.ndarray) else value


@settings(max_examples=120, deadline=None)
@given(samples())
def test_the_sdk_reads_the_samples(response: types.SampleResponse) -> None:
    got = deserialize_sample_response(encode_sample(response))
    for name in (
        "prompt_logprobs_np",
        "topk_prompt_logprobs_np",
        "target_prompt_logprobs",
        "prompt_alt_tokens",
        "prompt_cache_hit_tokens",
    ):
        assert raw(getattr(got, name)) == raw(getattr(response, name)), name
    assert len(got.sequences) == len(response.sequences)
    for mine, theirs in zip(response.sequences, got.sequences, strict=True):
        for name in ("stop_reason", "tokens_np", "logprobs_np", "topk_logprobs_np"):
            assert raw(getattr(theirs, name)) == raw(getattr(mine, name)), name


def test_sparse_targets_stay_sparse() -> None:
    sparse = types.TensorData(
        data=[-1.0, -2.0], dtype="float32", shape=[3, 5], sparse_crow_indices=[0, 1, 1, 2], sparse_col_indices=[4, 0]
    )
    got = deserialize_sample_response(encode_sample(types.SampleResponse(sequences=[], target_prompt_logprobs=sparse)))
    assert got.target_prompt_logprobs is not None
    assert got.target_prompt_logprobs.sparse_crow_indices == [0, 1, 1, 2]
    assert torch.equal(got.target_prompt_logprobs.to_torch(), sparse.to_torch())


def test_sequences_made_of_lists_are_encoded_too() -> None:
    sequence = types.SampledSequence(
        stop_reason="stop", sequence_id="a", _tokens_list=[3, 4], _logprobs_list=[-0.5, -0.25]
    )
    got = deserialize_sample_response(encode_sample(types.SampleResponse(sequences=[sequence]))).sequences[0]
    assert (got.tokens, got.logprobs) == ([3, 4], [-0.5, -0.25])
