"""What a training job did with each call: its advantage, and the learner's logprobs of its tokens."""

from __future__ import annotations

from collections.abc import Sequence

from tinker import types

from nat_plugin_evsys.calls import CallFate, CallKey, DropReason
from nat_plugin_evsys.rollouts.datums import CallSpan, DatumSet

Learned = dict[CallKey, list[float | None]]
"""The learner's logprobs of the output ids of each trained call; None at those that a grammar forced."""


def learner_logprobs(batch: Sequence[DatumSet], output: types.ForwardBackwardOutput) -> Learned:
    """The learner's logprobs of each call of an optimizer step, as its forward_backward returned them.

    This computes nothing. Calls with an advantage of 0 are left out, and so are tokens that a grammar forced: they add
    nothing to the loss, so the engine does not compute their logprobs. Nothing for a service that returns none.

    Args:
        batch: the groups of the step; ``output`` has their Datums in this order.
    """
    learned: Learned = {}
    pairs = [pair for datums in batch for pair in zip(datums.datums, datums.provenance, strict=True)]
    results = output.loss_fn_outputs if len(output.loss_fn_outputs) == len(pairs) else [{}] * len(pairs)
    for (datum, origin), result in zip(pairs, results, strict=True):
        if "logprobs" not in result:
            continue
        logprobs = result["logprobs"].to_numpy()
        advantages = datum.loss_fn_inputs["advantages"].to_numpy()
        for span in origin.spans:
            if advantages[span.rows[0]] != 0:
                values: list[float | None] = [None] * (span.stop - span.start)
                for row in span.rows.tolist():
                    values[row - span.start] = float(logprobs[row])
                learned[_key(span)] = values
    return learned


def call_fates(datums: DatumSet, learned: Learned, lost_reason: DropReason | None) -> dict[CallKey, CallFate]:
    """What became of each call of a group.

    Args:
        lost_reason: why calls with a Datum were not trained on in the end; None if they were.
    """
    fates = {key: CallFate(dropped=reason) for key, reason in datums.reasons.items()}
    for datum, origin in zip(datums.datums, datums.provenance, strict=True):
        advantages = datum.loss_fn_inputs["advantages"].to_numpy()
        for span in origin.spans:
            advantage = float(advantages[span.rows[0]])
            fates[_key(span)] = CallFate(lost_reason, advantage, learned.get(_key(span)))
    return fates


def _key(span: CallSpan) -> CallKey:
    return span.call_id, span.index
