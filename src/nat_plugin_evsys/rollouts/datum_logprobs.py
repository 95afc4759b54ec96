"""Datums with the learner's logprobs in place of the recorded ones, in some of their rows."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from tinker import Datum, TensorData

from nat_plugin_evsys.rollouts.datums import CallSpan, Provenance, as_tensor


def with_prompt_logprobs(datum: Datum, origin: Provenance, learner: TensorData) -> Datum:
    """A copy of ``datum`` whose prompt rows carry the learner's own logprobs; sampled rows keep the sampler's.

    ``dro`` has no mask: ``-(lp A - beta/2 (lp - q)^2)`` would pull every prompt token towards its q of 0. With q the
    learner's current lp, both that term and its gradient ``beta (lp - q)`` vanish, exactly as if the row were masked.

    Args:
        learner: logprobs of target_tokens under the weights that the gradient is taken at, shape (n-1,).
    """
    return _with_logprobs(datum, origin.spans, prompt=learner, sampled=datum.loss_fn_inputs["logprobs"])


def with_sampled_logprobs(datum: Datum, origin: Provenance, learner: TensorData) -> Datum:
    """A copy of ``datum`` whose sampled rows carry the learner's logprobs in place of the sampler's.

    Args:
        learner: logprobs of target_tokens under the weights that sampled, shape (n-1,).
    """
    return _with_logprobs(datum, origin.spans, prompt=datum.loss_fn_inputs["logprobs"], sampled=learner)


def with_missing_logprobs(datum: Datum, origin: Provenance, learner: TensorData) -> Datum:
    """A copy of ``datum`` with the learner's logprobs where the sampler's are unknown.

    Args:
        learner: logprobs of target_tokens under the weights before the first step, shape (n-1,).
    """
    unknown = [span for span in origin.spans if span.logprobs_unknown]
    return _with_logprobs(datum, unknown, prompt=datum.loss_fn_inputs["logprobs"], sampled=learner)


def _with_logprobs(datum: Datum, spans: Iterable[CallSpan], *, prompt: TensorData, sampled: TensorData) -> Datum:
    """A copy of ``datum`` with logprobs ``sampled`` in the rows of ``spans`` and ``prompt`` elsewhere, (n-1,) each."""
    logprobs = np.array(prompt.to_numpy(), dtype=np.float32)
    of_calls = sampled.to_numpy()
    for span in spans:
        logprobs[span.rows] = of_calls[span.rows]
    return Datum(
        model_input=datum.model_input, loss_fn_inputs={**datum.loss_fn_inputs, "logprobs": as_tensor(logprobs)}
    )
