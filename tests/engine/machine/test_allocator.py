"""The allocator: big buffers keep their pages, unless the environment says otherwise."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

PROBE = """
import resource, threading, torch
from nat_plugin_evsys.engine.machine.allocator import keep_memory
kept = keep_memory()
def faults():
    for _ in range(25):
        torch.ones(12_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(12_000_000)
    print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
faults()
thread = threading.Thread(target=faults)
thread.start()
thread.join()
"""
PAGES = 5 * 12_000_000 * 4 // 4096


def run(setting: str) -> list[tuple[bool, int]]:
    environment = {**os.environ, "EVSYS_KEEP_MEMORY": setting}
    # Huge pages would hide the faults that are counted here.
    environment["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=0"
    out = subprocess.run([sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True, check=True)
    return [(a == "True", int(b)) for a, b in (line.split() for line in out.stdout.splitlines())]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is changed")
def test_freed_buffers_are_used_again_in_every_thread() -> None:
    for kept, faults in run("1"):
        assert kept
        assert faults < PAGES / 20


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is changed")
def test_the_environment_turns_it_off() -> None:
    assert not any(kept for kept, _ in run("0"))
