"""One way to sample, in a process of its own: reads a line of JSON, answers with a line of JSON.

``ours`` is this package's sampler; ``generate`` is a PEFT user's loop around Hugging Face's ``generate``: batched,
padded on the left, with a KV cache, the whole conversation encoded again every turn; ``continuous`` is transformers'
``generate_batch``. All have the same weights and sample the same number of tokens: no token ends a sequence.
"""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path
from typing import Protocol

import torch

sys.path.insert(0, str(Path(__file__).parent))

from models import engine_model, peft_model
from workloads import FULL, SMALL, Shape

Prompts = list[list[int]]


class Engine(Protocol):
    """A way to sample."""

    def sample(self, prompts: Prompts, samples: int, tokens: int) -> list[list[int]]:
        """``samples`` continuations of ``tokens`` tokens each after every prompt, prompt by prompt."""
        ...

    def new_version(self) -> None:
        """What was computed with the weights of before must not be used again."""
        ...

    def close(self) -> None:
        """End what runs beside."""
        ...


class Ours:
    """The sampler, as ``LocalBackend`` drives it. Every rollout is a new policy version."""

    def __init__(self, shape: Shape, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        from nat_plugin_evsys.engine.machine.allocator import keep_memory
        from nat_plugin_evsys.engine.sampler import Sampler

        if device == "cpu":
            keep_memory()
        base, self._adapter = engine_model(shape, device, dtype)
        self._sampler = Sampler(base)
        # A GPU and other precisions are sampled from in the plain way.
        assert not self._sampler.plain_because or device != "cpu" or dtype != torch.float32
        self._version = -1
        self.new_version()

    def new_version(self) -> None:
        self._version += 1
        self._client = self._sampler.client(self._adapter, self._version)

    def close(self) -> None:
        self._sampler.close()

    def sample(self, prompts: Prompts, samples: int, tokens: int) -> list[list[int]]:
        from tinker import types

        params = types.SamplingParams(max_tokens=tokens, temperature=1.0, stop=[])
        futures = [self._client.sample(types.ModelInput.from_ints(p), samples, params) for p in prompts]
        return [sequence.tokens for future in futures for sequence in future.result().sequences]


class Generate:
    """Hugging Face's ``generate`` on a PEFT model."""

    def __init__(self, shape: Shape, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self._model = peft_model(shape, device, dtype)[0].eval()
        self._device = device

    def new_version(self) -> None:
        pass

    def close(self) -> None:
        pass

    def sample(self, prompts: Prompts, samples: int, tokens: int) -> list[list[int]]:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=self._device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self._device)
        out = self._model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=samples,
            max_new_tokens=tokens,
            eos_token_id=None,
            pad_token_id=0,
        )
        continuations: list[list[int]] = out[:, width:].tolist()
        return continuations


class Continuous(Generate):
    """transformers' continuous batching, paged, of the same PEFT model; it has no number of samples a prompt."""

    def sample(self, prompts: Prompts, samples: int, tokens: int) -> list[list[int]]:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        config = GenerationConfig(
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=tokens, eos_token_id=-1, pad_token_id=0
        )
        wanted = [prompt for prompt in prompts for _ in range(samples)]
        # Without a number of pages it takes most of the machine's memory.
        paging = ContinuousBatchingConfig(page_size=32, num_blocks=1024, max_batch_tokens=1024)
        found = self._model.base_model.model.generate_batch(
            wanted, generation_config=config, continuous_batching_config=paging, progress_bar=False
        )
        return [output.generated_tokens for output in found.values()]


def r1(engine: Engine, shape: Shape) -> int:
    """4 prompts of 512 tokens, 8 samples each of 64 tokens. Returns the tokens sampled."""
    rng = random.Random("R1")
    prompts = [_tokens(rng, shape, 512) for _ in range(4)]
    return sum(map(len, engine.sample(prompts, 8, 64 // shape.divide)))


def r2(engine: Engine, shape: Shape) -> int:
    """16 episodes after 384 shared tokens and 32 own ones: 4 turns of 48 sampled tokens, 64 of a tool between them."""
    rng = random.Random("R2")
    shared = _tokens(rng, shape, 384)
    episodes = [shared + _tokens(rng, shape, 32) for _ in range(16)]
    sampled = 0
    for turn in range(4):
        replies = engine.sample(episodes, 1, 48 // shape.divide)
        sampled += sum(map(len, replies))
        if turn < 3:
            episodes = [e + r + _tokens(rng, shape, 64) for e, r in zip(episodes, replies, strict=True)]
    return sampled


def _tokens(rng: random.Random, shape: Shape, count: int) -> list[int]:
    return [rng.randrange(shape.vocab) for _ in range(count // shape.divide)]


ROLES = {"ours": Ours, "generate": Generate, "continuous": Continuous}
WORKLOADS = {"R1": r1, "R2": r2}


def main() -> None:
    """``rollouts_worker.py ROLE full|small``: requests are ``{"workload": name}``."""
    torch.set_num_threads(1)
    shape = SMALL if sys.argv[2] == "small" else FULL
    engine: Engine = ROLES[sys.argv[1]](shape)
    # Loading kernels and code is no rollout's business.
    engine.sample([[1, 2, 3], [4]], 2, 3)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        engine.new_version()
        start, wall = time.process_time(), time.perf_counter()
        tokens = WORKLOADS[json.loads(line)["workload"]](engine, shape)
        seconds, wall = time.process_time() - start, time.perf_counter() - wall
        print(json.dumps({"seconds": seconds, "wall": wall, "tokens": tokens}), flush=True)
    engine.close()


if __name__ == "__main__":
    main()
