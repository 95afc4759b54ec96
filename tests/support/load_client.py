"""One client of the load check: mixed operations through the Tinker SDK, each noted in a journal before it is sent.

    python load_client.py URL KEY BASE_MODEL JOURNAL OPERATIONS SEED

May be killed at any moment and started again with the same journal: it then opens a new session, goes on from its last
saved state (or from nothing) and sends what is left of OPERATIONS. Needs nothing but ``tinker``, torch and the standard
library.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections import deque
from pathlib import Path
from typing import Any

import tinker
import torch
from tinker import types

IN_FLIGHT = 4


class Journal:
    """A file of JSON lines, each on disk before the next thing happens."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # A kill can leave half a line.
        text = path.read_text() if path.exists() else ""
        self.lines = [json.loads(line) for line in text.split("\n")[:-1]]
        self._file = path.open("w")
        for line in self.lines:
            self._file.write(json.dumps(line) + "\n")

    def note(self, **facts: Any) -> None:
        """Add a line."""
        self._file.write(json.dumps(facts) + "\n")
        self._file.flush()


def main() -> None:
    """The command line."""
    url, key, base_model, journal_path, operations, seed = sys.argv[1:]
    os.environ["TINKER_TELEMETRY"] = "0"
    journal = Journal(Path(journal_path))
    sent = sum(line["event"] == "send" for line in journal.lines)
    saved = [line["path"] for line in journal.lines if line["event"] == "done" and line.get("path")]
    rng = random.Random(f"{seed}/{sent}")
    with tinker.ServiceClient(base_url=url, api_key=key) as service:
        if saved and rng.random() < 0.7:
            model = service.create_training_client_from_state_with_optimizer(saved[-1])
        else:
            model = service.create_lora_training_client(base_model, rank=4, train_unembed=False)
        Client(service, model.result(), journal, rng).run(int(operations) - sent, first=sent)
    journal.note(event="end")


class Client:
    """Sends operations, at most ``IN_FLIGHT`` of which are unanswered."""

    def __init__(self, service: Any, model: Any, journal: Journal, rng: random.Random) -> None:
        self._service, self._model, self._journal, self._rng = service, model, journal, rng
        self._model_id = model.model_id
        self._flying: deque[tuple[int, Any]] = deque()
        self._gradients = 0
        self._sampler: Any = None

    def run(self, count: int, first: int) -> None:
        """Send ``count`` operations, numbered from ``first``."""
        for number in range(first, first + count):
            self._send(number)
            while len(self._flying) >= IN_FLIGHT:
                self._land()
        while self._flying:
            self._land()

    def _send(self, number: int) -> None:
        kind = self._rng.choices(
            ["forward_backward", "optim_step", "forward", "save_weights", "save_weights_for_sampler", "sample"],
            [45, 20, 8, 5, 5, 17],
        )[0]
        if kind == "optim_step" and not self._gradients:
            kind = "forward_backward"
        if kind == "sample" and self._sampler is None:
            kind = "save_weights_for_sampler"
        self._journal.note(event="send", n=number, model=self._model_id, kind=kind)
        self._flying.append((number, getattr(self, f"_{kind}")(number)))

    def _land(self) -> None:
        number, future = self._flying.popleft()
        result = future.result()
        facts: dict[str, Any] = {}
        if isinstance(result, types.ForwardBackwardOutput):
            facts["loss"] = result.metrics["loss:sum"]
        elif isinstance(result, types.SampleResponse):
            facts["tokens"] = [list(s.tokens) for s in result.sequences]
        elif isinstance(result, types.SaveWeightsResponse):
            facts["path"] = result.path
        self._journal.note(event="done", n=number, model=self._model_id, **facts)

    def _datums(self) -> list[types.Datum]:
        made = []
        for _ in range(self._rng.randint(1, 6)):
            length = self._rng.randint(2, 40)
            ids = [self._rng.randrange(256) for _ in range(length + 1)]
            floats = {
                name: types.TensorData.from_torch(torch.tensor([self._rng.uniform(-1, 0) for _ in range(length)]))
                for name in ("logprobs", "advantages")
            }
            inputs = {"target_tokens": types.TensorData.from_torch(torch.tensor(ids[1:])), **floats}
            made.append(types.Datum(model_input=types.ModelInput.from_ints(ids[:-1]), loss_fn_inputs=inputs))
        return made

    def _forward_backward(self, number: int) -> Any:
        self._gradients += 1
        return self._model.forward_backward(self._datums(), self._rng.choice(["importance_sampling", "ppo"]))

    def _forward(self, number: int) -> Any:
        return self._model.forward(self._datums(), "importance_sampling")

    def _optim_step(self, number: int) -> Any:
        self._gradients = 0
        return self._model.optim_step(types.AdamParams(learning_rate=1e-3, grad_clip_norm=1.0))

    def _save_weights(self, number: int) -> Any:
        return self._model.save_state(f"s{number}")

    def _save_weights_for_sampler(self, number: int) -> Any:
        future = self._model.save_weights_for_sampler(f"w{number}")
        self._sampler = self._service.create_sampling_client(model_path=future.result().path).result()
        return future

    def _sample(self, number: int) -> Any:
        prompt = types.ModelInput.from_ints([self._rng.randrange(256) for _ in range(self._rng.randint(1, 30))])
        return self._sampler.sample(prompt, self._rng.randint(1, 4), types.SamplingParams(max_tokens=8))


if __name__ == "__main__":
    main()
