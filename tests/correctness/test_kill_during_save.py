"""A process killed at any moment of a save leaves the previous checkpoint, or the new one, never a part."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

TRIES = {"renameat2": 50, "plain renames": 12}

# One process loads torch and forks a child for every try, which is killed at a random moment after its first or
# second save began. All B matrices and first moments of a save hold the number of its step, so that whatever is loaded
# tells which save it came from. "plain renames" is what a kernel without renameat2 gives.
PROGRAM = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
from safetensors.torch import load_file
from tinker import types
from nat_plugin_evsys import files
from nat_plugin_evsys.engine.checkpoint_loading import load_checkpoint
from nat_plugin_evsys.engine.checkpoints import list_checkpoints, save_checkpoint
from nat_plugin_evsys.engine.gradient.trainable import TrainableModel
from nat_plugin_evsys.engine.model.loading import load_base_model
from nat_plugin_evsys.engine.model.lora import LoraAdapter

model_dir, root, plan = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
base = load_base_model(model_dir, device="cpu")
model, probe = (TrainableModel(base, LoraAdapter.create(base.model, rank=4, alpha=8.0)) for _ in range(2))
datum = types.Datum(types.ModelInput.from_ints([1, 2, 3]), {"target_tokens": [2, 3, 4]})
model.forward_backward([datum], "cross_entropy")
model.optim_step(types.AdamParams())  # moments, so that the file of the optimizer is as large as in earnest

def save(step):
    model.step = step
    with torch.no_grad():
        for _, b in model.adapter.weights.values():
            b.fill_(step)
        for state in model.optimizer._optimizer.state.values():
            state["exp_avg"].fill_(step)
    save_checkpoint(directory, "last", model, kind="training")

def whole(info):
    values = {float(t.max()) for n, t in load_file(info.path / "adapter_model.safetensors").items() if "lora_B" in n}
    return values == {float(info.step)}

def kill(tries):
    save(1)
    started = time.perf_counter()
    for _ in range(3):
        save(1)
    typical = (time.perf_counter() - started) / 3
    rng, step, seen = random.Random(0), 1, set()
    found = {"lost": 0, "mixed": 0, "torn_listed": 0, "mid_save": 0, "saves": 0}
    for attempt in range(tries):
        finished, tell = os.pipe()
        child = os.fork()
        while child == 0:
            save(model.step + 1)
            os.write(tell, b".")
            save_checkpoint(directory, f"step-{model.step % 3}", model, kind="sampler")
        os.close(tell)
        for _ in range(rng.randrange(2)):
            os.read(finished, 1)
        time.sleep(rng.uniform(0, typical))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(finished)
        names = {p.name for p in directory.iterdir()}
        found["mid_save"] += any(".tmp-" in name for name in names - seen)
        seen = names
        try:
            info = load_checkpoint(directory / "last", probe, with_optimizer=True)
        except Exception as exc:
            return found | {"lost": 1, "error": repr(exc)}
        loaded = {float(b.detach().max()) for _, b in probe.adapter.weights.values()}
        moments = {float(t.max()) for n, t in probe.optimizer.state_tensors().items() if n.endswith("exp_avg")}
        found["mixed"] += not (loaded == moments == {float(info.step)}) or info.step < step
        found["saves"] += info.step - step
        listed = list_checkpoints(directory)
        found["torn_listed"] += sum(not whole(i) for i in listed)
        visible = {p.name for p in directory.iterdir() if not p.name.startswith(".")}
        assert {i.path.name for i in listed} == visible, "what has a plain name is whole"
        step = model.step = info.step
    return found

results = {}
for swap, tries in plan.items():
    directory = root / swap
    if swap == "plain renames":
        files._exchange = lambda new, target: False
    results[swap] = kill(tries)
print(json.dumps(results))
"""


def test_kill_nine_during_saves(
    model_dir: Callable[[str], Path], measured: Callable[..., None], tmp_path: Path
) -> None:
    command = [sys.executable, "-c", PROGRAM, str(model_dir("qwen3")), str(tmp_path), json.dumps(TRIES)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    compared = {
        "lost": "previous checkpoint lost",
        "mixed": "weights, moments and step of different saves",
        "torn_listed": "half-written checkpoint listed",
    }
    for swap, found in json.loads(done.stdout.splitlines()[-1]).items():
        tries = TRIES[swap]
        assert not found["lost"], found["error"]
        assert found["mid_save"] > tries / 4, "the kills must have hit saves in progress"
        assert found["saves"] > tries / 4, "the children must have finished saves between the kills"
        for key, what in compared.items():
            measured(
                "5 kill -9 during save", f"{what} (times)", swap,
                worst=found[key], bound=0, kills=tries, inside_a_write=found["mid_save"], saves=found["saves"],
            )  # fmt: skip
