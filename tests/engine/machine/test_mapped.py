"""Mapped tensors are zeros like others, and their memory goes when they do."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from nat_plugin_evsys.engine.machine.mapped import mapped_zeros

CPU = torch.device("cpu")

PROBE = """
import sys, torch
from pathlib import Path
from nat_plugin_evsys.engine.machine.allocator import give_back, keep_memory, note_step
from nat_plugin_evsys.engine.machine.mapped import mapped_zeros
keep_memory()
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 >> 20
def freed(make):
    before = resident()
    one, pin = make(), torch.ones(1000)
    held = resident() - before
    del one
    return held, resident() - before, pin
print(*freed(lambda: mapped_zeros((100, 2**18), torch.float32, torch.device("cpu")).fill_(1.0))[:2])
kept = freed(lambda: torch.ones(100, 2**18))
print(*kept[:2])
for step in (False, True):
    before = resident()
    if step:
        note_step()
    give_back()
    print(before - resident())
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 3), (2, 3), (3, 1000, 700)])
def test_they_are_zeros_of_the_shape(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    made = mapped_zeros(shape, dtype, CPU)
    assert made.shape == shape
    assert made.dtype == dtype
    assert not made.any()
    with torch.inference_mode():
        assert bool((made.add_(1.0) == 1.0).all())


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_freed_ones_are_not_resident_and_the_heap_gives_back_after_a_step() -> None:
    environment = {**os.environ, "EVSYS_KEEP_MEMORY": "1"}
    out = subprocess.run([sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True, check=True)
    mapped, heap, [without], [given] = ([int(n) for n in line.split()] for line in out.stdout.splitlines())
    assert mapped[0] >= 95
    assert mapped[1] < 5
    assert heap[0] >= 95
    assert heap[1] >= 95
    assert without < 5
    assert given >= 90


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not enforce it")
def test_no_room_is_a_memory_error() -> None:
    code = (
        "import resource, torch; from nat_plugin_evsys.engine.machine.mapped import mapped_zeros\n"
        "resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30, 8 * 2**30))\n"
        "mapped_zeros((2**20, 2**14), torch.float32, torch.device('cpu'))"
    )
    failed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "MemoryError: no memory for 65536 MiB" in failed.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_process_has_its_own() -> None:
    """Python maps shared memory unless told otherwise."""
    code = (
        "import os, torch; from nat_plugin_evsys.engine.machine.mapped import mapped_zeros\n"
        "made = mapped_zeros((3, 1000, 700), torch.float32, torch.device('cpu'))\n"
        "child = os.fork()\n"
        "if child == 0: made[0, 0, 0] = 7.0; os._exit(0)\n"
        "os.waitpid(child, 0); print(float(made[0, 0, 0]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0.0"
