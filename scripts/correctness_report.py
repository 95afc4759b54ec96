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
Every loss of the engine (`forward_backward`: logprobs, loss, gradient of every LoRA matrix) against a float64
computation that shares no code with it: transformers alone, the adapter merged into the weights, one right-padded
batch with an attention mask (Gemma's sliding windows: by causality alone, since padding beyond the window would see
no key), plain autograd. Batches are drawn by hypothesis: family, ragged lengths from 1 to 24, one to five Datums,
LoRA with and without the unembedding, sequences with and without a common beginning, cut into micro-batches of
three sizes, on the fast path and on the plain one; ratios on both sides of the thresholds (batches with one nearer
than 1e-5 are drawn again: the gradient jumps there); thresholds by default, from `loss_fn_config` and per token;
weights of any sign. *Relative* means: of the loss, to the sum of its terms' magnitudes; of the gradient, 2-norm to
2-norm; of one matrix, to its largest entry (or to a hundredth of the whole gradient's largest entry if that is
more; to the latter itself where the matrix has no gradient at all, such as the query of a token that sees one key).
The last row checks each formula and a derivative worked out by hand on hypothesis' own numbers.
""",
    "2 sampler and trainer": """
LoRA's B is moved away from zero, then sampled logprobs are compared with those of `forward`, both through the
public `Backend`, in fp32. Two turns of requests of unequal length with three and two samples each, five rows at a
time (continuous batching), with prefixes taken from the cache. `forward` has temperature 1; the other temperatures
are compared with transformers alone in float64. The recorded calls are those of an OpenAI client that converses
(plain, streamed, `n` > 1, with tools) with a policy endpoint over `builtin/tiny` after four training steps on its
own calls.
""",
    "3 resume": """
Six steps (cross_entropy and importance_sampling in turn, a learning rate schedule, weight decay, clipping in every
other step) in one process, against three, `save_full_state`, and three more in a **new process** after
`load_state(with_optimizer=True)`. Compared are all bits of the saved weights and moments and the losses of the
steps. A load of the weights alone is checked to end elsewhere.
""",
    "4 isolation": """
Two adapters over one base model. One is probed, the other is trained, while two threads sample from both; then the
probe is repeated. Compared are all bits.
""",
    "5 kill -9 during save": """
A process that saves over and over is killed at a random moment of a save. Afterwards the checkpoint of that name
must load with weights, moments and step of one save, no older than the last one known, and every listed checkpoint
must be whole. Once with the kernel's atomic exchange of two directories, once with the plain renames that are used
where the kernel has none.
""",
    "6 learning": """
A small SFT and a small RL task against an independent plain-PyTorch run with the same data order and seeds.
""",
    "9 optimizer and PEFT": """
`optim_step` on real gradients of two accumulated calls, with random schedules of all AdamParams. Saved adapters
loaded by `peft`, and merged by it into the base model (tied unembeddings are untied first: a delta on the head is
not one on the embedding).
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
        f"Written by `{COMMAND}`, which runs the tests of `tests/correctness` and takes every figure from them. "
        "Edit the script, not this page.",
        "Proofs are numbered as in the plan; one without a section here has tests but recorded no figure.",
        machine(),
        "**CUDA paths are unmeasured.** Every figure here is of float32 on a CPU with one torch thread; nothing on "
        "this page says anything about bfloat16, about a GPU's kernels or about more threads.",
    ]
    proofs = sorted({row["proof"] for row in rows})
    for proof in proofs:
        number, name = proof.split(" ", 1)
        own = [row for row in rows if row["proof"] == proof]
        parts += [
            f"## {number}. {name[0].upper()}{name[1:]}",
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
