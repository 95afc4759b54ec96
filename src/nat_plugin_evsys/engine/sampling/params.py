"""The two names of the sampling parameters argument."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nat_plugin_evsys.errors import DataError

if TYPE_CHECKING:
    from tinker import types


def given_params(
    sampling_params: types.SamplingParams | None, params: types.SamplingParams | None
) -> types.SamplingParams:
    """The argument that was given: ``sampling_params`` is Tinker's name, ``params`` evsys's.

    Raises:
        DataError: neither, both, or something else.
    """
    from tinker import types

    if sampling_params is not None and params is not None:
        raise DataError("sampling_params and params are two names of the same parameters; give one of them")
    given = sampling_params if sampling_params is not None else params
    if not isinstance(given, types.SamplingParams):
        raise DataError(f"sampling_params is a {type(given).__name__}; give types.SamplingParams")
    return given
