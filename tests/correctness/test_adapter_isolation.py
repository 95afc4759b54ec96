"""Training one adapter leaves another over the same base model bit-identical, with sampling beside it."""

from __future__ import annotations

import asyncio
import hashlib
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tinker import types
from tiny import VOCAB, perturb

from nat_plugin_evsys.backends.base import SamplingClient
from nat_plugin_evsys.backends.local import LocalBackend
from nat_plugin_evsys.engine.model.lora import LoraAdapter

ADAM = types.AdamParams(learning_rate=1e-2, weight_decay=0.01)
PROMPT = types.ModelInput.from_ints([random.Random(1).randrange(VOCAB) for _ in range(37)])
PARAMS = types.SamplingParams(max_tokens=20, seed=4, stop=[], temperature=1.1)


def batch(seed: int) -> list[types.Datum]:
    rng = random.Random(seed)
    rows = [[rng.randrange(VOCAB) for _ in range(rng.randrange(4, 40))] for _ in range(6)]
    return [types.Datum(types.ModelInput.from_ints(r[:-1]), {"target_tokens": r[1:]}) for r in rows]


async def step(backend: LocalBackend, seed: int) -> None:
    await backend.forward_backward_async(batch(seed), loss_fn="cross_entropy")
    await backend.optim_step_async(ADAM)


async def sampled(client: SamplingClient) -> list[Any]:
    result = await client.sample_async(PROMPT, 3, PARAMS)
    return [(sequence.tokens, list(sequence.logprobs or [])) for sequence in result.sequences]


async def probe(backend: LocalBackend, name: str) -> dict[str, Any]:
    """What can be seen of a backend from outside: weights and moments as saved bytes, logprobs, samples."""
    saved = Path(await backend.save_full_state(name))
    output = await backend.forward_async(batch(77), loss_fn="cross_entropy")
    client = await backend.snapshot_sampling_client()
    return {
        "weights": hashlib.sha256((saved / "adapter_model.safetensors").read_bytes()).hexdigest(),
        "moments": hashlib.sha256((saved / "optimizer.safetensors").read_bytes()).hexdigest(),
        "forward": [out["logprobs"].tolist() for out in output.loss_fn_outputs],
        "prompt logprobs": await client.compute_logprobs_async(PROMPT),
        "samples": await sampled(client),
    }


class Sampling(threading.Thread):
    """Samples again and again from another thread until told to stop; every result must be the first one."""

    def __init__(self, client: SamplingClient) -> None:
        super().__init__(daemon=True)
        self._client, self._done = client, threading.Event()
        self.enough = threading.Event()
        self.rounds = self.differing = 0
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            asyncio.run(self._sample())
        except BaseException as exc:  # noqa: BLE001 - raised again in the test's own thread
            self.error = exc

    async def _sample(self) -> None:
        await sampled(self._client)  # the first time nothing is in the prefix cache, which changes the rounding
        expected = await sampled(self._client)
        while not self._done.is_set():
            self.rounds += 1
            self.differing += await sampled(self._client) != expected
            if self.rounds == 5:
                self.enough.set()

    def finish(self) -> None:
        self._done.set()
        self.join(60)
        if self.error is not None:
            raise self.error
        assert self.rounds >= 5


async def test_the_others_steps_change_nothing(
    base_of: Callable[[str], Any], measured: Callable[..., None], tmp_path: Path
) -> None:
    base = base_of("qwen3")

    def backend(name: str, seed: int, rank: int) -> LocalBackend:
        adapter = perturb(LoraAdapter.create(base.model, rank=rank, alpha=8.0, seed=seed, train_unembed=True), seed)
        return LocalBackend(base, adapter, checkpoint_dir=tmp_path / name)

    kept, trained, alone = backend("kept", 1, 4), backend("trained", 2, 6), backend("alone", 2, 6)
    await step(kept, 50)  # moments to keep
    await kept.forward_backward_async(batch(51), loss_fn="cross_entropy")  # a gradient that waits for its step
    before = {"kept": await probe(kept, "before"), "trained": await probe(trained, "before")}

    beside = Sampling(await kept.snapshot_sampling_client())
    beside.start()
    busy = Sampling(await trained.snapshot_sampling_client())
    busy.start()
    steps = 25
    for number in range(steps):
        await step(trained, number)
    for thread in (beside, busy):
        await asyncio.to_thread(thread.enough.wait, 60)
        thread.finish()

    after = {"kept": await probe(kept, "after"), "trained": await probe(trained, "after")}
    assert all(before["trained"][key] != after["trained"][key] for key in after["trained"]), "training must matter"
    wrong = sum(before["kept"][key] != after["kept"][key] for key in after["kept"])
    measured(
        "4 isolation", f"weights, moments, forward, prompt logprobs and samples before vs after the other's {steps} "
        "steps (differing)", worst=wrong, bound=0, probes=len(after["kept"]),
    )  # fmt: skip
    measured(
        "4 isolation", "seeded samples drawn in threads beside the training (differing)",
        worst=beside.differing + busy.differing, bound=0, rounds=beside.rounds + busy.rounds,
    )  # fmt: skip

    # Nor did the sampling beside it change the training, nor the other's training the gradient that waited.
    for number in range(steps):
        await step(alone, number)
    quiet = await probe(alone, "after")
    wrong = sum(quiet[key] != after["trained"][key] for key in quiet)
    measured(
        "4 isolation", f"{steps} steps with sampling and another adapter beside vs alone (differing)",
        worst=wrong, bound=0, probes=len(quiet),
    )  # fmt: skip
    await kept.optim_step_async(ADAM)
    twin = backend("twin", 1, 4)
    await step(twin, 50)
    await step(twin, 51)
    assert (await probe(twin, "end"))["weights"] == (await probe(kept, "end"))["weights"]
    for one in (kept, trained, alone, twin):
        await one.close()
