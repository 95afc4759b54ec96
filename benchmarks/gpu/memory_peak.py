"""How near the engine's prediction of a step's memory is to the step's real peak."""

from __future__ import annotations

import torch
from findings import Findings
from models import engine_model
from place import Place
from table import row
from worker import as_datums
from workloads import workload

from nat_plugin_evsys.engine.gradient.trainable import TrainableModel

WITHIN = 0.1
GOALS = {f"{name} peak off the prediction": (WITHIN, WITHIN / 2) for name in ("W1", "W3")}
"""Upper bounds."""


def run(findings: Findings, place: Place) -> None:
    """A lone step of W1 and one of W3 at 0.6B.

    A GPU counts what is allocated. On the CPU, where it is no figure of the engine's, what autograd kept stands for it.
    """
    model = TrainableModel(*engine_model(place.shape("0.6B"), place.device, torch.bfloat16))
    goals = {} if place.small else GOALS
    for name in ("W1", "W3" if place.small else "W3x64"):
        label, data = name.partition("x")[0], as_datums(workload(name, place.shape("0.6B")))
        with findings.attempt(label):
            model.forward_backward(data, "importance_sampling")  # what is made once is no part of a step
            model.discard_gradient()
            before = place.restart_peak()
            metrics = model.forward_backward(data, "importance_sampling").metrics
            predicted, kept = metrics["activation_predicted_bytes:max"], metrics["activation_bytes:max"]
            peak = place.peak() - before if place.device == "cuda" else kept
            model.discard_gradient()
            findings.row(row(f"{label} peak off the prediction", [abs(peak / predicted - 1)], goals))
            for what, value in (("predicted", predicted), ("kept for the backward pass", kept), ("peak", peak)):
                findings.figure(f"{label} {what}", value / 2**30, "GiB")
