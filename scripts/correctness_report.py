#!/usr/bin/env python
"""Run the proofs of tests/correctness and write docs/correctness.md from what they measured.

    .venv/bin/python scripts/correctness_report.py

Every figure of the page comes from the tests' own ``measured`` calls in this run; nothing is written unless all pass.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "correctness.md"
COMMAND = "python scripts/correctness_report.py"
LIBRARIES = ("torch", "transformers", "peft", "safetensors", "tinker", "numpy", "hypothesis")

EXPLANATIONS = {
    "1 losses": """
Every loss of the engine (`forward_backward`: logprobs, loss, gradient of every LoRA matrix) is compared with a
float64 computation that shares no code with it: transformers alone, with the adapter merged into the weights, one
right-padded batch with an attention mask, and plain autograd. (Gemma's sliding windows use causality alone, since
padding beyond the window would see no key.) Hypothesis draws the batches: model family, ragged lengths from 1 to
24, one to five Datums, LoRA with and without the unembedding, sequences with and without a common prefix,
micro-batches of three sizes, the fast and the plain path, ratios on both sides of the thresholds, default,
`loss_fn_config` and per-token thresholds, and weights of either sign. A batch with a ratio within 1e-5 of a
threshold is drawn again, because the gradient jumps there. *Relative* means: for the loss, relative to the sum of
its terms' magnitudes; for the gradient, 2-norm to 2-norm; for one matrix, relative to its largest entry, or to a
hundredth of the whole gradient's largest entry if that is more. A matrix that has no gradient (such as the query of
a token that sees one key) is compared with the whole gradient's largest entry. The last row checks each formula,
and a derivative worked out by hand, on numbers drawn by hypothesis.
""",
    "2 sampler and trainer": """
LoRA's B is moved away from zero. Then sampled logprobs are compared with those of `forward`, both through the
public `Backend`, in fp32: two turns of requests of unequal length, three and two samples each, five rows at a time
(continuous batching), with prefixes from the cache. `forward` has temperature 1; other temperatures are compared
with transformers alone in float64. The recorded calls come from an OpenAI client in conversation (plain, streamed,
`n` > 1, with tools) with a policy endpoint over `builtin/tiny`, after four training steps on its own calls.
""",
    "3 resume": """
Six steps in one process (alternating cross_entropy and importance_sampling, with a learning rate schedule, weight
decay, and clipping in every other step) are compared with three steps, `save_full_state`, and three more in a **new
process** after `load_state(with_optimizer=True)`. The comparison covers every bit of the saved weights and moments,
and the losses of the steps. The test also checks that loading the weights alone gives a different result.
""",
    "4 isolation": """
Two adapters share one base model. One is probed, the other is trained while two threads sample from both, and then
the probe is repeated. All bits are compared.
""",
    "5 kill -9 during save": """
A process that keeps saving is killed at a random moment of a save. Afterwards the checkpoint of that name must load
with the weights, moments and step of a single save, no older than the last one known, and every listed checkpoint
must be complete. The test runs with the kernel's atomic exchange of two directories, and with the plain renames
used on kernels without it.
""",
    "6 learning": """
A small SFT and a small RL task against an independent plain-PyTorch run with the same data order and seeds.
""",
    "9 optimizer and PEFT": """
`optim_step` runs on real gradients of two accumulated calls, with random schedules of all AdamParams. `peft` loads
the saved adapters and merges them into the base model (tied unembeddings are untied first, since a delta on the
head is not one on the embedding).
""",
}


def main() -> int:
    """Run the tests, write the page; the exit code is pytest's."""
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "measured.jsonl"
        environment = {**os.environ, "EVSYS_CORRECTNESS_RECORD": str(record), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", str(ROOT / "tests" / "correctness"), *sys.argv[1:]]
        done = subprocess.run(command, cwd=ROOT, env=environment)
        if done.returncode != 0:
            print(f"a proof failed: {PAGE.relative_to(ROOT)} is left as it was", file=sys.stderr)
            return done.returncode
        rows = [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(rows), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}: {len(rows)} figures")
    return 0


def page(rows: list[dict[str, Any]]) -> str:
    """The whole page."""
    parts = [
        "# Correctness: what was compared, and the worst deviation seen",
        f"Written by `{COMMAND}`, which runs `tests/correctness` and takes every figure from these tests. "
        "Edit the script, not this page.",
        machine(),
        "**CUDA paths are unmeasured.** Every figure is for float32 on a CPU with one torch thread. This page says "
        "nothing about bfloat16, GPU kernels or more threads.",
    ]
    proofs = sorted({row["proof"] for row in rows})
    for proof in proofs:
        _, name = proof.split(" ", 1)  # the number only orders the sections
        own = [row for row in rows if row["proof"] == proof]
        parts += [
            f"## {name[0].upper()}{name[1:]}",
            EXPLANATIONS.get(proof, "").strip(),
            summary(own),
            details(own),
        ]
    return "\n\n".join(part for part in parts if part) + "\n"


def machine() -> str:
    """Machine type and library versions; no names, no paths."""
    lines = [f"| Python {platform.python_version()}, {platform.system()} | {cpu()} |", "|---|---|"]
    lines += [f"| {name} | {version(name)} |" for name in LIBRARIES]
    return "\n".join(lines)


def cpu() -> str:
    """The processor's kind and the number of cores that this process may use."""
    info = Path("/proc/cpuinfo")
    models = [
        line.split(":", 1)[1].strip()
        for line in (info.read_text().splitlines() if info.exists() else [])
        if line.startswith("model name")
    ]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{platform.machine()}, {models[0] if models else platform.processor() or 'CPU'}, {cores} cores"


def summary(rows: list[dict[str, Any]]) -> str:
    """One line for each thing compared, over all its subjects."""
    lines = ["| compared | cases | bound | worst |", "|---|---|---|---|"]
    for compared in unique(row["compared"] for row in rows):
        own = [row for row in rows if row["compared"] == compared]
        cases: Counter[str] = Counter()
        for row in own:
            cases.update(row["cases"])
        counted = ", ".join(f"{count:,} {unit.replace('_', ' ')}" for unit, count in cases.items())
        worst = max(row["worst"] for row in own)
        lines.append(f"| {compared} | {counted} | {figure(own[0]['bound'])} | **{figure(worst)}** |")
    return "\n".join(lines)


def details(rows: list[dict[str, Any]]) -> str:
    """The worst deviation of each subject, in columns of what was compared."""
    blocks = []
    groups: dict[tuple[str, ...], list[str]] = {}
    for compared in unique(row["compared"] for row in rows if row["subject"]):
        subjects = tuple(row["subject"] for row in rows if row["compared"] == compared)
        groups.setdefault(subjects, []).append(compared)
    worst = {(row["compared"], row["subject"]): figure(row["worst"]) for row in rows}
    for subjects, columns in groups.items():
        if len(subjects) < 2 or set(worst[c, s] for c in columns for s in subjects) == {"0"}:
            continue
        lines = [f"| worst | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        lines += [f"| {s} | {' | '.join(worst[c, s] for c in columns)} |" for s in subjects]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def unique(values: Any) -> list[str]:
    """Values in the order of their first appearance."""
    return list(dict.fromkeys(values))


def figure(value: float) -> str:
    """Two digits of a deviation; a count as it is."""
    return f"{value:.0f}" if value == int(value) else f"{value:.1e}"


if __name__ == "__main__":
    sys.exit(main())
