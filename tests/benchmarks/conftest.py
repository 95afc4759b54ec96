"""The benchmarks are scripts: their modules are found where they lie."""

from __future__ import annotations

import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path += [str(BENCHMARKS / "cpu"), str(BENCHMARKS / "gpu")]
