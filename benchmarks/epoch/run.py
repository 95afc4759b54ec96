"""Where the wall time of `nat finetune` goes: sampling, training, or neither.

    python benchmarks/epoch/run.py tiny           # configs/tiny.yml: a tiny model, 32 rows x 8, 8 tokens
    python benchmarks/epoch/run.py 64x8           # 64 rows x 8 samples of up to 64 tokens, 8 layers of 640

Runs the real command in this process and notes when the sampler computes a step and when the trainer computes an
operation. Time is counted from the first sampled token to the end of the last optimizer step, without the final
evaluation. ``neither`` is what the event loop, JSON, HTTP, NAT and the evaluator take while both engines wait for them.
Writes benchmarks/out/epoch-NAME.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
Interval = tuple[float, float]


def main() -> None:
    """Run one of the two and print its shares."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=("tiny", "64x8"))
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--overlap", action="store_true", help="with the trainer's overlap_rollouts")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = _config(given.name, Path(folder), given.epochs, given.overlap)
        path = Path(folder) / "config.yml"
        path.write_text(yaml.safe_dump(config))
        sampling, training, cpu = _finetune(path)
    shares = _shares(sampling, training)
    shares["cpu_seconds_per_wall_second"] = cpu / shares["seconds"]
    for key, value in shares.items():
        print(f"{key:32s} {value:8.3f}")
    out = ROOT / "benchmarks" / "out" / f"epoch-{given.name}.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps({"epochs": given.epochs, "overlap": given.overlap, **shares}, indent=2) + "\n")


def _config(name: str, folder: Path, epochs: int, overlap: bool) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((ROOT / "configs" / "tiny.yml").read_text())
    run_dir = str(folder / "run")
    config["finetuning"].update(output_dir=run_dir, num_epochs=epochs)
    config["llms"]["policy"]["output_dir"] = run_dir
    config["eval"]["general"]["output_dir"] = str(folder / "eval")
    trainer = config["trainers"]["trainer"]
    trainer["overlap_rollouts"] = overlap
    trainer["validation_dataset"] = str(ROOT / trainer["validation_dataset"])
    dataset = config["eval"]["general"]["dataset"]
    rows = json.loads((ROOT / dataset["file_path"]).read_text())
    if name == "64x8":
        # Random weights write random text: this is right about half of the time, so groups have a spread of rewards.
        answer = r"^[^a-m]*[a-g]"
        rows = [dict(rows[i % len(rows)], id=f"row-{i}", answer=answer) for i in range(64)]
        for i, row in enumerate(rows):
            row["question"] += f" This is ticket {i}."
        config["eval"]["evaluators"]["right_team"]["mode"] = "regex"
        config["llms"]["policy"].update(base_model=str(_model(folder / "model")), max_tokens=64)
        del trainer["validation_dataset"]
    (folder / "rows.json").write_text(json.dumps(rows))
    dataset["file_path"] = str(folder / "rows.json")
    return config


def _model(folder: Path) -> Path:
    """Qwen3 with random weights, 8 layers of 640, and the tokenizer of builtin/tiny."""
    sys.path.insert(0, str(ROOT / "benchmarks" / "cpu"))
    from models import build_model
    from workloads import Shape

    from nat_plugin_evsys.engine.model.builtin import builtin_tokenizer

    tokenizer = builtin_tokenizer("builtin/tiny", folder)
    model = build_model(Shape(vocab=len(tokenizer)))
    model.config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _finetune(config: Path) -> tuple[list[Interval], list[Interval], float]:
    """When the command sampled and trained, and its CPU seconds from the first of these to the last."""
    from nat.cli.main import run_cli

    from nat_plugin_evsys.engine.gradient.trainable import TrainableModel
    from nat_plugin_evsys.engine.sampler import Sampler

    marks: list[float] = []
    sampling, training = [], []  # type: list[Interval], list[Interval]
    _note(Sampler, "_step", sampling, marks)
    for operation in ("forward_backward", "forward", "optim_step"):
        _note(TrainableModel, operation, training, marks)
    sys.argv = ["nat", "finetune", "--config_file", str(config)]
    try:
        run_cli()
    except SystemExit as done:
        if done.code:
            raise
    return sampling, training, marks[-1] - marks[0]


def _note(owner: type, name: str, intervals: list[Interval], marks: list[float]) -> None:
    function: Callable[..., Any] = getattr(owner, name)

    def noted(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        marks.append(time.process_time())
        try:
            return function(*args, **kwargs)
        finally:
            intervals.append((start, time.perf_counter()))
            marks.append(time.process_time())

    setattr(owner, name, noted)


def _shares(sampling: list[Interval], training: list[Interval]) -> dict[str, float]:
    start, end = min(i[0] for i in sampling), max(i[1] for i in training)
    sampled, trained, either = (
        _covered(intervals, start, end) for intervals in (sampling, training, [*sampling, *training])
    )
    whole = end - start
    return {
        "seconds": whole,
        "sampling": sampled / whole,
        "training": trained / whole,
        "neither": 1 - either / whole,
    }


def _covered(intervals: list[Interval], start: float, end: float) -> float:
    """Seconds of ``[start, end]`` that lie in any interval."""
    total, at = 0.0, start
    for low, high in sorted(intervals):
        low, high = max(low, at), min(high, end)
        if high > low:
            total, at = total + high - low, high
    return total


if __name__ == "__main__":
    main()
