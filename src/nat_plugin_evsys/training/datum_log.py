"""``datums-<job>.jsonl``: every trained Datum with the calls that it came from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from nat_plugin_evsys.rollouts.datums import DatumSet


def datum_records(datums: DatumSet, step: int) -> Iterator[dict[str, Any]]:
    """One record per Datum, with Tinker's names: ``model_input``, ``target_tokens``, ``logprobs``, ``advantages``, …

    ``calls`` lists the calls with the rows ``start:stop`` of their sampled tokens.
    """
    for datum, origin in zip(datums.datums, datums.provenance, strict=True):
        yield {
            "step": step,
            "group": origin.group,
            "trajectory": origin.trajectory,
            "calls": [asdict(span) for span in origin.spans],
            "model_input": datum.model_input.to_ints(),
            **{name: tensor.tolist() for name, tensor in datum.loss_fn_inputs.items()},
        }
