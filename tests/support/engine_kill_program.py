"""A process that forks engines and kills them with -9, again and again, while a script of operations goes through.

``python engine_kill_program.py MODEL ROOT LIVES``: once without kills, in ROOT/whole, and once with LIVES of them, in
ROOT/killed. Prints one JSON line: how many operations had ended at each kill.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path

from engine_operations import SESSION, EngineHarness, ModelOperations, sample_operation
from random_datums import byte_datums, datum
from transformers.utils import logging as transformers_logging

from nat_plugin_evsys.service.store.operations import Operation
from nat_plugin_evsys.service.wire.kinds import OperationKind
from nat_plugin_evsys.service.work.states import StatePolicy

transformers_logging.disable_progress_bar()

STEPS = 12
PROMPT = list(b"abc")
VOCAB = 260


def script(base_model: str) -> list[Operation]:
    """The operations of two models, in the order that a client sends them. No two runs of it differ."""
    first, second = ModelOperations(0), ModelOperations(1)
    made = [first.create(base_model, seed=None), second.create(base_model, seed=7)]
    bad = [datum([1, 999], {"target_tokens": [1, 2]})]
    for step in range(STEPS):
        for model in (first, second):
            made += [model.forward_backward(byte_datums(100 * step + chunk, length=30)) for chunk in range(2)]
            if step == 3 and model is second:
                made.append(model.forward_backward(bad))
            made.append(model.optim_step(1e-2 / (1 + step), grad_clip_norm=1.0))
        if step % 4 == 1:
            made.append(second.save(f"step-{step}"))
            made.append(second.save_ephemeral(step))
        if step % 4 == 3:
            made.append(second.load(f"tinker://{second.model_id}/weights/step-{step - 2}", optimizer=step % 8 == 3))
    made.append(first.save("end"))
    made.append(second.save("end"))
    made += [second.save("sampled", OperationKind.SAVE_WEIGHTS_FOR_SAMPLER)]
    for step in range(1, STEPS, 4):
        asked = {"max_tokens": 6, "num_samples": 2, "seed": step, "stop": [], "topk_sample_logprobs": VOCAB}
        made += [sample_operation(f"{SESSION}:sample:{step}", n, PROMPT, **asked) for n in range(3)]
    # All were sent before anything failed, whenever a life of the server came to them.
    return [replace(operation, created_at=1.0) for operation in made]


def live(base_model: str, root: Path, told: int) -> None:
    """One life of a server: take up what is unfinished, send what was not sent, until all has ended."""

    def tell(request_id: str) -> None:
        body = harness.store.outcome(request_id).outcome.body  # type: ignore[union-attr]
        os.write(told, f"{request_id} {hashlib.sha256(body).hexdigest()}\n".encode())

    harness = EngineHarness(
        root, [base_model], state_policy=StatePolicy(least_seconds=0.0, cost_factor=1.0), on_finished=tell
    )
    operations = script(base_model)
    for operation in operations:
        # A sample can be asked for once its sampling session is there.
        if operation.kind == OperationKind.SAMPLE:
            harness.wait(operations[-10].request_id)
        harness.put(operation)
    harness.wait(*(operation.request_id for operation in operations))
    harness.close()


def main(base_model: str, root: Path, lives: int) -> list[int]:
    """Kill ``lives`` servers, then let one finish. Returns how many operations had ended at each kill."""
    rng = random.Random(0)
    root.mkdir(parents=True)
    told = os.open(root / "told", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    ended = []
    for attempt in range(lives + 1):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                live(base_model, root / "store", told)
                code = 0
            except BaseException:
                traceback.print_exc()
                raise
            finally:
                os._exit(code)
        if attempt < lives:
            before = (root / "told").stat().st_size
            deadline = time.monotonic() + 20
            while (root / "told").stat().st_size == before and time.monotonic() < deadline:
                time.sleep(0.002)  # it loads its model
            time.sleep(rng.uniform(0.0, 0.5))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            ended.append(len((root / "told").read_text().splitlines()))
        elif status:
            raise SystemExit("a server failed")
    return ended


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]) / "whole", 0)
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]) / "killed", int(sys.argv[3]))))
