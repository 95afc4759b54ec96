"""Memory of sampling and training in one process, at the quickstart's batch: resident peak, over the weights.

    python -W ignore benchmarks/cpu/memory.py [--base-model builtin/smollm2-135m] [--versions 3]

Per version of the policy: 8 tickets, 8 answers of up to 8 tokens each, one step on all of them. What the process had
before the model was loaded is subtracted. The last line is the one to compare; the loaded weights are 1.0 of it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from tinker import types

from nat_plugin_evsys.backends.local import LocalBackend

ROOT = Path(__file__).parents[2]
SYSTEM = (
    "You are a help desk. Answer with exactly one word, the team that should handle the ticket, in lower case: "
    "network, printing, accounts or payroll."
)
GROUPS, GENERATIONS, MAX_TOKENS = 8, 8, 8
MIB = 2**20


def memory() -> dict[str, int]:
    """``VmRSS``, ``VmHWM`` (its peak), ``RssAnon`` and ``RssFile`` of this process, in bytes."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {w[0].rstrip(":"): int(w[1]) * 1024 for w in lines if len(w) == 3 and w[2] == "kB"}


async def measure(base_model: str, versions: int) -> None:
    before, start = memory()["VmRSS"], time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        backend = await LocalBackend.create(
            base_model, checkpoint_dir=Path(directory), device="cpu", dtype="float32", untrained_logprobs=False
        )
        weights = sum(p.nbytes for p in backend.base.model.parameters())
        prompts = ticket_prompts(backend.base.tokenizer)
        print(f"{base_model}: weights {weights / MIB:.0f} MiB; the rest in multiples of that")

        def say(what: str) -> None:
            now = memory()
            cells = {"resident": now["VmRSS"] - before, "peak": now["VmHWM"] - before, "of files": now["RssFile"]}
            text = "  ".join(f"{name} {value / weights:5.2f}" for name, value in cells.items())
            print(f"{what:<12}{text}  after {time.perf_counter() - start:5.1f} s", flush=True)

        say("loaded")
        for version in range(versions):
            client: Any = await backend.snapshot_sampling_client()
            params = types.SamplingParams(max_tokens=MAX_TOKENS, seed=1, temperature=1.0)
            results = await asyncio.gather(*(client.sample_async(p, GENERATIONS, params) for p in prompts))
            say(f"rollouts {version}")
            data = [
                datum(prompt.to_ints(), sequence, number)
                for prompt, result in zip(prompts, results, strict=True)
                for number, sequence in enumerate(result.sequences)
            ]
            await backend.forward_backward_async(data, loss_fn="importance_sampling")
            await backend.optim_step_async(types.AdamParams(learning_rate=1e-4))
            say(f"step {version}")
            del client, results
        await backend.close()
    print(f"peak over weights: {(memory()['VmHWM'] - before) / weights:.2f}")


def ticket_prompts(tokenizer: Any) -> list[types.ModelInput]:
    """The first tickets of the quickstart's dataset as its agent sends them."""
    rows = json.loads((ROOT / "examples/helpdesk/data/train.json").read_text())[:GROUPS]
    chats = [[{"role": "system", "content": SYSTEM}, {"role": "user", "content": row["question"]}] for row in rows]
    rendered = [tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False) for c in chats]
    return [types.ModelInput.from_ints(list(ids)) for ids in rendered]


def datum(prompt: list[int], sequence: Any, number: int) -> types.Datum:
    """With advantages of either sign."""
    sampled, before = list(sequence.tokens), len(prompt) - 1
    inputs: Any = {
        "target_tokens": [*prompt[1:], *sampled],
        "logprobs": [0.0] * before + list(sequence.logprobs),
        "advantages": [0.0] * before + [(-1.0) ** number] * len(sampled),
    }
    return types.Datum(types.ModelInput.from_ints([*prompt, *sampled[:-1]]), inputs)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-model", default="builtin/smollm2-135m")
    parser.add_argument("--versions", type=int, default=3)
    arguments = parser.parse_args()
    asyncio.run(measure(arguments.base_model, arguments.versions))
