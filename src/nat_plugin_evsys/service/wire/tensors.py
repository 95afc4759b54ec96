"""Tensors on the wire: little-endian bytes, a dtype, a shape; dense or sparse CSR."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from tinker import types
from tinker.types.topk_logprobs import TopkLogprobs

from nat_plugin_evsys.errors import WireError
from nat_plugin_evsys.service.proto import tinker_wire_pb2 as wire_pb2

Array = npt.NDArray[np.generic]

FLOAT32 = np.dtype("<f4")
INT32 = np.dtype("<i4")
INT64 = np.dtype("<i8")
_BFLOAT16 = np.dtype("<u2")  # numpy has none; it is the upper half of a float32

_DTYPES: dict[int, np.dtype[np.generic]] = {
    wire_pb2.DTYPE_FLOAT32: FLOAT32,
    wire_pb2.DTYPE_INT64: INT64,
    wire_pb2.DTYPE_INT32: INT32,
    wire_pb2.DTYPE_BFLOAT16: _BFLOAT16,
}

MAX_DENSE = 2**26
"""Elements of a request's sparse tensors once they are dense: a few bytes could name any shape."""

_MAX_DIMENSIONS = 8


def numbers(raw: bytes, dtype: np.dtype[np.generic], where: str) -> Array:
    """The numbers in ``raw``, 1-D, not writable.

    Raises:
        WireError: ``raw`` is not a whole number of them.
    """
    if len(raw) % dtype.itemsize:
        raise WireError(f"{where} has {len(raw)} bytes, which is not a multiple of {dtype.itemsize} ({dtype.name})")
    return np.frombuffer(raw, dtype=dtype)


def decode_tensor(message: wire_pb2.Tensor, where: str) -> types.TensorData:
    """The SDK's ``TensorData``: float32 or int64, int32 and bfloat16 widened. Without a shape it is 1-D.

    Raises:
        WireError: dtype, bytes, shape and indices do not fit each other.
    """
    dtype = _DTYPES.get(message.dtype)
    if dtype is None:
        raise WireError(f"{where}.dtype is {message.dtype}; it must be one of {sorted(_DTYPES)}")
    if len(message.shape) > _MAX_DIMENSIONS:
        raise WireError(f"{where}.shape has {len(message.shape)} sizes; at most {_MAX_DIMENSIONS} are read")
    shape = list(message.shape)
    if any(size < 0 for size in shape):
        raise WireError(f"{where}.shape is {shape}; a size is never negative")
    encoding = message.WhichOneof("encoding")
    if encoding == "sparse_csr":
        return _decode_sparse(message.sparse_csr, dtype, shape, f"{where}.sparse_csr")
    if encoding is None:
        raise WireError(f"{where} has neither dense nor sparse_csr values")
    values = _widened(numbers(message.dense, dtype, f"{where}.dense"))
    shape = shape or [len(values)]
    if math.prod(shape) != len(values):
        raise WireError(f"{where} has {len(values)} values, but its shape is {shape}")
    try:
        values = values.reshape(shape)
    except ValueError as exc:  # larger than numpy's, with a zero among them
        raise WireError(f"{where} cannot have the shape {shape}: {exc}") from exc
    return types.TensorData(data=values, dtype=_name(values), shape=shape)


def dense_elements(tensor: types.TensorData) -> int:
    """Number of elements of a sparse tensor once dense; 0 for a dense one."""
    return 0 if tensor.sparse_crow_indices is None else math.prod(tensor.shape or [])


def encode_tensor(tensor: types.TensorData) -> wire_pb2.Tensor:
    """A dense ``TensorData``; a sparse one stays sparse."""
    values = tensor._numpy
    wide = INT64 if tensor.dtype == "int64" else FLOAT32
    message = wire_pb2.Tensor(
        dtype=wire_pb2.DTYPE_INT64 if wide is INT64 else wire_pb2.DTYPE_FLOAT32,
        shape=values.shape if tensor.shape is None else tensor.shape,
    )
    if tensor.sparse_crow_indices is None:
        message.dense = to_bytes(values, wide)
        return message
    message.sparse_csr.values = to_bytes(values, wide)
    message.sparse_csr.crow_indices = to_bytes(tensor.sparse_crow_indices, INT64)
    message.sparse_csr.col_indices = to_bytes(tensor.sparse_col_indices or [], INT64)
    return message


def encode_topk(topk: TopkLogprobs) -> wire_pb2.TopkLogprobs:
    """Ids int32 and logprobs float32, (length, k) each, row by row."""
    length, k = topk.token_ids.shape
    return wire_pb2.TopkLogprobs(
        token_ids=to_bytes(topk.token_ids, INT32), logprobs=to_bytes(topk.logprobs, FLOAT32), k=k, length=length
    )


def to_bytes(values: npt.ArrayLike, dtype: np.dtype[np.generic]) -> bytes:
    """``values`` as the wire has them, row by row."""
    return np.ascontiguousarray(values, dtype=dtype).tobytes()


def _decode_sparse(
    message: wire_pb2.SparseCsr, dtype: np.dtype[np.generic], shape: list[int], where: str
) -> types.TensorData:
    values = _widened(numbers(message.values, dtype, f"{where}.values"))
    rows = numbers(message.crow_indices, INT64, f"{where}.crow_indices")
    columns = numbers(message.col_indices, INT64, f"{where}.col_indices")
    if len(shape) != 2:
        raise WireError(f"{where}: the shape is {shape}; a sparse tensor has two sizes")
    if len(values) != len(columns):
        raise WireError(f"{where} has {len(values)} values, but {len(columns)} col_indices")
    if len(rows) != shape[0] + 1 or rows[0] != 0 or rows[-1] != len(values) or (np.diff(rows) < 0).any():
        raise WireError(f"{where}.crow_indices do not divide {len(values)} values into {shape[0]} rows")
    if len(columns) and (columns.min() < 0 or columns.max() >= shape[1]):
        raise WireError(f"{where}.col_indices are not all from 0 to {shape[1] - 1}")
    _check_rising(rows, columns, where)
    return types.TensorData(
        data=values,
        dtype=_name(values),
        shape=shape,
        sparse_crow_indices=rows.tolist(),
        sparse_col_indices=columns.tolist(),
    )


def _check_rising(rows: Array, columns: Array, where: str) -> None:
    falls = np.flatnonzero(np.diff(columns) <= 0) + 1  # only the first of a row need not be above the one before it
    if len(bad := np.setdiff1d(falls, rows)):
        raise WireError(f"{where}.col_indices[{bad[0]}] is not above the one before it in its row")


def _widened(values: Array) -> Array:
    """The wire's int32 as int64 and bfloat16 as float32; a copy, since the SDK's tensors are writable."""
    if values.dtype == _BFLOAT16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.int64 if values.dtype == INT32 else values.dtype)


def _name(values: Array) -> types.TensorDtype:
    return "int64" if values.dtype.kind == "i" else "float32"


def joined(arrays: Sequence[Array], dtype: np.dtype[np.generic]) -> tuple[bytes, bytes]:
    """All arrays' bytes one after the other, and the n + 1 byte offsets between them (int64)."""
    sizes = np.array([0, *(array.size for array in arrays)], dtype=np.int64) * dtype.itemsize
    return b"".join(to_bytes(array, dtype) for array in arrays), to_bytes(np.cumsum(sizes), INT64)
