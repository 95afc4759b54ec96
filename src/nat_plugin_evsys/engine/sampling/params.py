"""Sampling parameters: the two names of the argument, and what this package adds to Tinker's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nat_plugin_evsys.errors import DataError

if TYPE_CHECKING:
    from tinker import types

LARGEST_BIAS, BANNED = 100.0, -100.0
"""OpenAI's limits of ``logit_bias``; the lower one bans a token."""

_NEUTRAL: dict[str, Any] = {
    "min_tokens": 0,
    "logit_bias": None,
    "repetition_penalty": 1.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "min_p": 0.0,
}
"""The parameters that Tinker does not have, and their values that change nothing."""


def extensions_of(params: Any) -> dict[str, Any]:
    """Those parameters that Tinker does not have and that are set to change something."""
    asked = {name: getattr(params, name, neutral) for name, neutral in _NEUTRAL.items()}
    return {name: value for name, value in asked.items() if value != _NEUTRAL[name] and value != {}}


def shaped_by(params: Any) -> dict[str, Any]:
    """Those of them that give another distribution than a learner computes, whatever the temperature.

    ``min_tokens`` and bans are not among them: like a grammar they say what may be sampled, and the log-probabilities
    stay the policy's own.
    """
    asked = extensions_of(params)
    asked.pop("min_tokens", None)
    bias = {token: value for token, value in (asked.pop("logit_bias", None) or {}).items() if value > BANNED}
    return {**asked, **({"logit_bias": bias} if bias else {})}


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
