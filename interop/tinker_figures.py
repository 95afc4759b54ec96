"""What programs that train with tinker's SDK measure."""

from __future__ import annotations

import statistics

from tinker import types


def distance(data: list[types.Datum], output: types.ForwardBackwardOutput) -> float:
    """How far the learner's logprobs are from those that were recorded, on average over sampled tokens."""
    pairs = [
        (old, new)
        for each, result in zip(data, output.loss_fn_outputs, strict=True)
        for old, new in zip(each.loss_fn_inputs["logprobs"].data, result["logprobs"].data, strict=True)
        if old
    ]
    return statistics.fmean(abs(old - new) for old, new in pairs)
