"""Part 2: steps and rollouts of one model's shape in bf16, beside plain PEFT with SDPA and Hugging Face's ``generate``.

In one process, strictly interleaved, each way warmed up on each workload. The gradients of both ways are compared.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from exact_gradients import BF16_BOUND, norm_gap
from findings import Findings
from place import PEAK_FLOPS, Place
from rollouts_worker import Engine, Generate, Ours, r1
from table import row
from useful import useful_flops
from worker import Step, ours, peft
from workloads import Shape, workload

Goals = dict[str, tuple[float, float]]

GOALS = {
    "W1 vs plain PEFT": (4.0, 8.0),
    "W2 vs plain PEFT": (3.0, 5.0),
    "W3 model FLOP utilisation": (0.4, 0.55),
    "R1 vs HF generate": (4.0, 10.0),
}
"""Floor and aim of the 4B shape; the others have none."""

REPEATS = 2


def run(findings: Findings, place: Place, title: str) -> None:
    """All rows of the model that is called ``title``."""
    shape = place.shape(title)
    goals = GOALS if title == "4B" and not place.small else {}
    options: dict[str, Any] = {"device": place.device, "dtype": torch.bfloat16}
    steps = {"ours": ours(shape, **options), "plain": peft(shape, **options)}
    for name in ("W1", "W2", "W3" if place.small else "W3x64"):
        with findings.attempt(name):
            _training(findings, place, shape, name, steps, goals)
    del steps
    _free()
    engines: dict[str, Engine] = {"ours": Ours(shape, **options), "generate": Generate(shape, **options)}
    with findings.attempt("R1"):
        _rollouts(findings, place, shape, engines, goals)
    for engine in engines.values():
        engine.close()


def _training(findings: Findings, place: Place, shape: Shape, name: str, steps: dict[str, Step], goals: Goals) -> None:
    label, data = name.partition("x")[0], workload(name, shape)
    gradients = {way: step(data)[0] for way, step in steps.items()}
    findings.exact(f"{label} gradient vs plain PEFT", norm_gap(gradients["ours"], gradients["plain"]), BF16_BOUND)
    del gradients
    seconds: dict[str, list[float]] = {way: [] for way in steps}
    peaks: dict[str, float] = {}
    for _ in range(REPEATS):
        for way, step in steps.items():
            took, peaks[way] = _timed(place, step, data)
            seconds[way].append(took)
    findings.row(row(f"{label} vs plain PEFT", _ratios(seconds["plain"], seconds["ours"]), goals))
    shares = [useful_flops(data, shape) / s / PEAK_FLOPS for s in seconds["ours"]]
    findings.row(row(f"{label} model FLOP utilisation", shares, goals))
    for way in steps:
        findings.figure(f"{label} {way}", min(seconds[way]), "s")
        if place.device == "cuda":
            findings.figure(f"{label} {way}, peak beyond the weights", peaks[way] / 2**30, "GiB")


def _rollouts(findings: Findings, place: Place, shape: Shape, engines: dict[str, Engine], goals: Goals) -> None:
    seconds: dict[str, list[float]] = {way: [] for way in engines}
    for repeat in range(REPEATS + 1):
        for way, engine in engines.items():
            engine.new_version()
            took, _ = _timed(place, r1, engine, shape)
            if repeat:  # the first one warms up
                seconds[way].append(took)
    findings.row(row("R1 vs HF generate", _ratios(seconds["generate"], seconds["ours"]), goals))
    for way in engines:
        findings.figure(f"R1 {way}", min(seconds[way]), "s")


def _timed(place: Place, work: Callable[..., Any], *arguments: Any) -> tuple[float, float]:
    """Seconds of ``work``, and the bytes by which it grew at most (0 where the device does not count them)."""
    place.synchronize()
    before = place.restart_peak()
    start = time.perf_counter()
    work(*arguments)
    place.synchronize()
    return time.perf_counter() - start, place.peak() - before


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _ratios(theirs: list[float], own: list[float]) -> list[float]:
    return [a / b for a, b in zip(theirs, own, strict=True)]
