"""Where a step's time goes: attention, products, output head, LoRA, other kernels, and the host; and a table of it all.

By torch's profiler: a matrix product is told by its operands' shapes, which hold in the backward pass, too.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from findings import Findings
from models import RANK
from place import Place
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from worker import ours
from workloads import Shape, workload

KINDS = ("attention", "products", "head", "LoRA", "other")
_ATTENTION = re.compile("flex|flash|attention|fmha|sdpa|triton_tem", re.IGNORECASE)
_PRODUCT = re.compile(r"(^|::)(mm|addmm|bmm|baddbmm|addmm_|_linear\w*|mkldnn\w*linear\w*)$")
_STACKED = 3
"""At most so many layers' pairs are one matrix (``engine.tree.linear_stack``)."""


def run(findings: Findings, place: Place) -> None:
    """One warm step of W1 in bf16; the table goes to ``profile.txt``."""
    title = "4B"
    shape = place.shape(title)
    step, data = ours(shape, device=place.device, dtype=torch.bfloat16), workload("W1", shape)
    step(data)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if place.device == "cuda" else [])]
    with profile(activities=activities, record_shapes=True) as profiler:
        place.synchronize()
        start = time.perf_counter()
        step(data)
        place.synchronize()
        seconds = time.perf_counter() - start
    events = profiler.key_averages(group_by_input_shape=True)
    spent = split(events, shape, on_gpu=place.device == "cuda")
    for kind in KINDS:
        findings.figure(kind, spent[kind] / seconds)
    findings.figure("host", max(0.0, 1 - sum(spent.values()) / seconds))
    by = "self_device_time_total" if place.device == "cuda" else "self_cpu_time_total"
    lines = profiler.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=80)
    (place.out / "profile.txt").write_text(f"{title} W1, {seconds:.3f} s\n{lines}\n")


def split(events: Iterable[Any], shape: Shape, *, on_gpu: bool) -> dict[str, float]:
    """Seconds by kind.

    Args:
        events: the profiler's averages by operation and input shapes.
        shape: of the model.
        on_gpu: count what kernels take, else what operations take on the CPU themselves.
    """
    spent = dict.fromkeys(KINDS, 0.0)
    kernels = 0.0
    for event in events:
        is_kernel = event.device_type != DeviceType.CPU
        seconds = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
        if is_kernel:
            kernels += seconds
        # A kernel of a compiled function belongs to no operation; all others are counted with theirs.
        if _ATTENTION.search(event.key) and is_kernel == on_gpu:
            spent["attention"] += seconds
        elif not is_kernel and _PRODUCT.search(event.key):
            spent[_kind_of_product(event.input_shapes, shape)] += seconds
        elif not on_gpu and event.key.startswith(("aten::", "mkldnn::", "mkl::")):
            spent["other"] += seconds
    if on_gpu:
        spent["other"] = max(0.0, kernels - sum(spent.values()))
    return spent


def _kind_of_product(shapes: Sequence[Sequence[int]], shape: Shape) -> str:
    sizes = {size for operand in shapes for size in operand}
    if shape.vocab in sizes:
        return "head"
    ranks = {RANK * layers for layers in range(1, _STACKED + 1)}
    return "LoRA" if any(isinstance(size, int) and size in ranks for size in sizes) else "products"
