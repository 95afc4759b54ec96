"""A memory limit that PyTorch alone exceeds is refused by name, before anything fails for want of memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nat_plugin_evsys.address_space import LEAST_BYTES, address_space_left

NAT = Path(sys.executable).with_name("nat")


@pytest.mark.parametrize("mib", [900, LEAST_BYTES // 2**20 - 1])
@pytest.mark.parametrize("command", ["serve --port 0 --base-model", "check"])
def test_a_limit_too_low_for_pytorch_is_named_with_what_is_needed(command: str, mib: int) -> None:
    ended = _limited(f"exec {NAT} evsys {command} builtin/tiny", mib)
    assert ended.returncode == 1
    assert f"(ulimit -v {mib * 1024}), and with PyTorch and transformers even the smallest model needs" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_what_is_left_is_the_limit_less_what_is_mapped() -> None:
    assert address_space_left() is None
    program = "from nat_plugin_evsys.address_space import address_space_left; print(address_space_left())"
    ended = _limited(f"exec {sys.executable} -c '{program}'", 1000)
    assert 700 * 2**20 < int(ended.stdout) < 1000 * 2**20


def _limited(command: str, mib: int) -> subprocess.CompletedProcess[str]:
    whole = f"ulimit -v {mib * 1024}; {command}"
    return subprocess.run(["bash", "-c", whole], capture_output=True, text=True, timeout=120, check=False)
