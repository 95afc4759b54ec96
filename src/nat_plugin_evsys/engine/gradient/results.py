"""Converts loss results to Tinker's ForwardBackwardOutput."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tinker import types
from torch import Tensor

from nat_plugin_evsys.engine.gradient.datums import Example
from nat_plugin_evsys.engine.gradient.losses import LossResult, summarise, trained_rows

_OUTPUT_TYPE = "TorchLossReturn"


class DatumResult:
    """The results of one Datum, detached and on the CPU."""

    def __init__(self, logprobs: Tensor, result: LossResult, entropy: Tensor) -> None:
        self.logprobs = logprobs.detach().cpu()
        self.entropy = entropy.cpu()
        stats = {key: value.cpu() for key, value in result.stats.items()}
        self.result = LossResult(result.loss.detach().cpu(), result.elementwise.detach().cpu(), stats)


def build_output(results: Sequence[DatumResult], examples: Sequence[Example]) -> types.ForwardBackwardOutput:
    """Outputs per Datum in the order of ``examples``, and the metrics of the whole call."""
    metrics = summarise([r.result for r in results])
    if metrics["tokens:sum"]:
        kept = [r.entropy[trained_rows(e.inputs)] for r, e in zip(results, examples, strict=True)]
        metrics["entropy:mean"] = float(torch.cat(kept).double().mean())
    outputs = [
        {
            "logprobs": types.TensorData.from_torch(r.logprobs),
            "elementwise_loss": types.TensorData.from_torch(r.result.elementwise),
        }
        for r in results
    ]
    return types.ForwardBackwardOutput(_OUTPUT_TYPE, outputs, metrics)


def stack_targets(examples: Sequence[Example]) -> Tensor:
    """All targets as [rows, widest K]; narrower Datums are filled with token 0, which ``split_rows`` cuts off."""
    width = max(e.targets.shape[1] if e.targets.dim() == 2 else 1 for e in examples)
    matrices = [e.targets if e.targets.dim() == 2 else e.targets[:, None] for e in examples]
    return torch.cat([torch.nn.functional.pad(m, (0, width - m.shape[1])) for m in matrices])


def split_rows(logprobs: Tensor, examples: Sequence[Example]) -> list[Tensor]:
    """[rows, K] back to each Datum's own shape, (N,) or (N, K)."""
    parts = logprobs.split([len(e) for e in examples])
    return [
        p[:, 0] if e.targets.dim() == 1 else p[:, : e.targets.shape[1]] for p, e in zip(parts, examples, strict=True)
    ]
