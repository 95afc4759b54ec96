"""What the Tinker SDK and the server cost on top of the same calls in process.

    python benchmarks/service/overhead.py [--repeats 7]

Starts `nat evsys serve` on a model that is built on the spot, then takes turns: ``forward_backward + optim_step`` of
32 Datums through the unmodified SDK and the server, one through this package's in-process client. The ratio is that of
the wall times of one round (the server idles while the other works); printed are its median, least and greatest.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tinker
import torch
from tinker import types

from nat_plugin_evsys import ServiceClient
from nat_plugin_evsys.engine.model.loading import load_base_model

sys.path.insert(0, str(Path(__file__).parents[1] / "cpu"))
from models import build_model
from workloads import FULL, SMALL, Shape, workload

FLOOR = 1.15
LOSS = "importance_sampling"
ADAM = types.AdamParams(learning_rate=1e-4)
LORA: dict[str, Any] = {"rank": 16, "seed": 0, "train_mlp": True, "train_attn": True, "train_unembed": True}


def main() -> None:
    """Run it and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="rounds that are timed, after one that is not")
    parser.add_argument("--small", action="store_true", help="a small model: only checks that it runs")
    given = parser.parse_args()
    shape = SMALL if given.small else FULL
    with tempfile.TemporaryDirectory() as directory:
        model = save_model(Path(directory) / "model", shape)
        with server(model, Path(directory) / "store") as url:
            ratios, seconds = measure(url, model, datums(shape), given.repeats)
    row = {
        "name": "32 Datums (W1) through SDK and server / in process",
        "ratio": round(statistics.median(ratios), 3),
        "floor": FLOOR,
        "min": round(min(ratios), 3),
        "max": round(max(ratios), 3),
        "seconds_in_process": round(statistics.median(seconds), 3),
    }
    print(json.dumps(row, indent=2))
    out = Path("benchmarks/out/service.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"rows": [row]}, indent=2) + "\n")


def save_model(path: Path, shape: Shape) -> str:
    """The model of the CPU benchmarks, with the tokenizer of ``builtin/tiny``, as a directory."""
    build_model(shape).save_pretrained(path)
    load_base_model("builtin/tiny").tokenizer.save_pretrained(path)
    return str(path)


def datums(shape: Shape) -> list[types.Datum]:
    """Workload W1: 4 groups of 8 samples, 512 shared and 64 own tokens."""
    made = []
    for ids, trained in workload("W1", shape):
        mask = torch.tensor(trained[1:], dtype=torch.float32)
        inputs = {
            "target_tokens": types.TensorData.from_torch(torch.tensor(ids[1:])),
            "logprobs": types.TensorData.from_torch(-mask),
            "advantages": types.TensorData.from_torch(mask),
        }
        made.append(types.Datum(model_input=types.ModelInput.from_ints(ids[:-1]), loss_fn_inputs=inputs))
    return made


@contextmanager
def server(model: str, store: Path) -> Iterator[str]:
    """`nat evsys serve` in a process of its own; gives its URL."""
    command = [str(Path(sys.executable).parent / "nat"), "evsys", "serve", "--base-model", model]
    command += ["--port", "0", "--store", str(store)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "NO_COLOR": "1"})
    try:
        assert process.stdout is not None
        for line in process.stdout:
            found = re.search(r"http://[\d.]+:\d+", line)
            if found:
                yield found.group()
                return
        raise SystemExit(f"the server ended with code {process.wait()} before it listened")
    finally:
        process.terminate()
        process.wait(60)


def measure(url: str, model: str, data: list[types.Datum], repeats: int) -> tuple[list[float], list[float]]:
    """``(ratio of each round, seconds in process of each round)``."""
    os.environ["TINKER_TELEMETRY"] = "0"
    with (
        tinker.ServiceClient(base_url=url, api_key="tml-benchmark-0123456789") as remote_service,
        ServiceClient(store=tempfile.mkdtemp()) as local_service,
    ):
        remote = remote_service.create_lora_training_client(model, **LORA).result()
        local = local_service.create_lora_training_client(model, **LORA).result()
        through, within = stepper(remote, data), stepper(local, data)
        through(), within()
        rounds = [(through(), within()) for _ in range(repeats)]
    return [a / b for a, b in rounds], [b for _, b in rounds]


def stepper(client: Any, data: list[types.Datum]) -> Callable[[], float]:
    """One step, both calls submitted before the first is waited for; returns its seconds."""

    def step() -> float:
        started = time.perf_counter()
        losses = client.forward_backward(data, LOSS)
        stepped = client.optim_step(ADAM)
        losses.result()
        stepped.result()
        return time.perf_counter() - started

    return step


if __name__ == "__main__":
    main()
