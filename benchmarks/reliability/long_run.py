"""One ``nat finetune`` of very many tiny epochs: threads, memory, descriptors and disk must be flat over the last half.

    python benchmarks/reliability/long_run.py [--small] [--epochs N]

Rows of metrics.jsonl and jobs.jsonl and the bytes of the report grow with the epochs, as they should; the rest of the
run directory must not.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import yaml
from forked import Child, nat, preload

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
GROWING = ("metrics.jsonl", "jobs.jsonl", "trainer_adapter.jsonl", "report.html", "rewards.png")
SLACK = {
    "threads": (1, min),
    "descriptors": (2, min),
    "mib": (40, statistics.median),
    "kept_bytes": (20_000, statistics.median),
}
"""How much more the last quarter may show than the third one, and of which reading: where calls that are under way
have connections of their own, it is the least."""


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--epochs", type=int, default=2_000)
    arguments.add_argument("--small", action="store_true", help="60 epochs")
    options = arguments.parse_args()
    preload()
    with tempfile.TemporaryDirectory(prefix="evsys-long-") as place:
        summary = run(Path(place), 60 if options.small else options.epochs)
    print(json.dumps(summary, indent=1))
    return 1 if summary["wrong"] else 0


def run(place: Path, epochs: int) -> dict[str, Any]:
    """Run and watch; what is wrong is in ``wrong``."""
    started = time.monotonic()
    child = Child(nat("finetune", "--config_file", str(_write_config(place, epochs))), place / "log")
    process, readings, wrong = psutil.Process(child.pid), dict[int, dict[str, int]](), []
    while (code := child.wait(0.2)) is None:
        done = _epochs_done(place)
        if done and done not in readings:
            readings[done] = _read(process, place)
    if code != 0:
        raise SystemExit(f"the run ended with {code}: {(place / 'log').read_text()[-3000:]}")
    series = [readings[epoch] for epoch in sorted(readings)]
    third, last = series[len(series) // 2 : len(series) * 3 // 4], series[len(series) * 3 // 4 :]
    for name, (slack, reading_of) in SLACK.items():
        before, after = (reading_of([reading[name] for reading in part]) for part in (third, last))
        if after > before + slack:
            wrong.append(f"{name} grew from {before} to {after}")
    facts = {"epochs": epochs, "seconds": round(time.monotonic() - started), "readings": len(series)}
    return {**facts, "first": series[0], "middle": third[0], "last": series[-1], "wrong": wrong}


def _epochs_done(place: Path) -> int:
    found = list(place.glob("runs/run-*/state.json"))
    return int(json.loads(found[0].read_text())["epochs_done"]) if found else 0


def _read(process: psutil.Process, place: Path) -> dict[str, int]:
    files = [Path(folder) / name for folder, _, names in os.walk(place / "runs") for name in names]
    sizes = {path: _size(path) for path in files}
    return {
        "threads": process.num_threads(),
        "descriptors": process.num_fds(),
        "mib": process.memory_info().rss // MIB,
        "kept_bytes": sum(size for path, size in sizes.items() if path.name not in GROWING),
        "growing_bytes": sum(size for path, size in sizes.items() if path.name in GROWING),
    }


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # a temporary file, or a checkpoint that is being deleted
        return 0


def _write_config(place: Path, epochs: int) -> Path:
    config = yaml.safe_load((ROOT / "configs" / "tiny.yml").read_text())
    rows = json.loads((ROOT / "examples" / "helpdesk" / "data" / "train.json").read_text())[:2]
    (place / "train.json").write_text(json.dumps(rows))
    config["llms"]["policy"] |= {"output_dir": str(place / "runs"), "max_tokens": 3, "lora_rank": 1, "temperature": 2.0}
    config["eval"]["general"] |= {"output_dir": str(place / "eval")}
    config["eval"]["general"]["dataset"]["file_path"] = str(place / "train.json")
    config["trajectory_builders"]["builder"]["num_generations"] = 2
    config["trainer_adapters"]["adapter"]["learning_rate"] = 1.0e-6
    del config["trainers"]["trainer"]["validation_dataset"]
    config["trainers"]["trainer"] |= {"keep_rollouts": 0, "keep_checkpoints": 1}
    config["finetuning"] |= {"num_epochs": epochs, "output_dir": str(place / "runs")}
    path = place / "config.yml"
    path.write_text(yaml.safe_dump(config))
    return path


if __name__ == "__main__":
    sys.exit(main())
