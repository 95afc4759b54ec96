"""Training that is saved and resumed ends where training without a break ends, in every bit."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from findings import Findings
from models import engine_model
from place import Place
from tinker import types
from worker import as_datums
from workloads import workload

from nat_plugin_evsys.engine.checkpoint_loading import load_checkpoint
from nat_plugin_evsys.engine.checkpoints import save_checkpoint
from nat_plugin_evsys.engine.gradient.trainable import TrainableModel

HALF = 2
ADAM = types.AdamParams(learning_rate=1e-3, weight_decay=0.01, grad_clip_norm=1.0)


def check(findings: Findings, place: Place, family: str) -> None:
    """Four steps against two, a checkpoint, and two with a model and an adapter that are made anew.

    torch is asked for kernels that repeat bit for bit. Where some do not all the same, the figure says so: two runs of
    the same steps then differ, resumed or not.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        straight, again = _model(place, family), _model(place, family)
        with tempfile.TemporaryDirectory() as folder:
            _train(straight, place, family, range(HALF))
            saved = save_checkpoint(Path(folder), "half", straight, kind="training")
            _train(straight, place, family, range(HALF, 2 * HALF))
            resumed = _model(place, family)
            load_checkpoint(saved, resumed, with_optimizer=True)
        _train(resumed, place, family, range(HALF, 2 * HALF))
        _train(again, place, family, range(2 * HALF))
    finally:
        torch.use_deterministic_algorithms(False)
    findings.figure(f"{family} same steps again, tensors that differ", _differing(again, straight))
    findings.exact(f"{family} resume, tensors that differ", _differing(resumed, straight), 0)


def _model(place: Place, family: str) -> TrainableModel:
    return TrainableModel(*engine_model(place.exact_shape(family), place.device))


def _train(model: TrainableModel, place: Place, family: str, steps: range) -> None:
    names = ("W1", "W2v", "W3")
    for step in steps:
        data = as_datums(workload(names[step % len(names)], place.exact_shape(family)))
        model.forward_backward(data, "importance_sampling")
        model.optim_step(ADAM)


def _differing(one: TrainableModel, other: TrainableModel) -> int:
    """Of weights and moments."""
    found, expected = ({**m.parameters, **m.optimizer.state_tensors()} for m in (one, other))
    return sum(not torch.equal(found[name], tensor) for name, tensor in expected.items())
