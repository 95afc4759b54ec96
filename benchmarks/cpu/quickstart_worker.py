"""One way to take an RL step of the quickstart's size, in a process of its own: a line of JSON in, a line of JSON out.

A step is 64 rollouts, 8 after each of 8 prompts, of 32 tokens each (nothing ends one earlier), rewards, advantages, one
forward and backward pass and one step of AdamW, with LoRA of rank 32 on all linear layers. ``ours`` is this package's
backend, ``trl`` TRL's ``GRPOTrainer`` with its defaults, in micro-batches of 16 sequences (all 64 at once take 11 GB).
The reward is the share of even token ids: it costs nothing and differs within every group.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "learning"))

import workloads
from curve import GENERATIONS, GROUPS_PER_STEP, RANK
from tasks import helpdesk
from useful import sampling_flops, useful_flops
from worker import gemm_peak
from workloads import Shape

from nat_plugin_evsys.engine.machine.products import in_onednn_order, onednn_product
from nat_plugin_evsys.rollouts.advantages import group_advantages

TOKENS, RATE = 32, 3e-4
ALPHA = 32.0
MODELS = {"full": "builtin/smollm2-135m", "small": "builtin/tiny"}


def prompts(tokenizer: Any) -> list[str]:
    """Those of the quickstart's tickets, as text."""
    task = helpdesk()
    asked = [task.messages(row) for row in task.train]
    return [tokenizer.apply_chat_template(each, tokenize=False, add_generation_prompt=True) for each in asked]


def reward(ids: Sequence[int]) -> float:
    """Of a reply."""
    return sum(token % 2 == 0 for token in ids) / len(ids)


class Clock:
    """Answers a line of stdin with the CPU seconds since it was read."""

    def __init__(self) -> None:
        print(json.dumps({"ready": True}), flush=True)
        self._started = 0.0

    def asked(self) -> bool:
        """Wait for a line; False at the end of them."""
        line = sys.stdin.readline()
        self._started = time.process_time()
        return bool(line)

    def seconds(self) -> float:
        """CPU seconds since then."""
        return time.process_time() - self._started

    def answer(self, **facts: float) -> None:
        """Of the step that was asked for."""
        print(json.dumps(facts), flush=True)


class OurSteps:
    """Steps of a backend of this package, each with a policy version of its own.

    Attributes:
        sampling_seconds: CPU seconds of the last step's rollouts.
        sequences: of the last step: token ids, and which of them were sampled.
    """

    def __init__(self, backend: Any, tokenizer: Any) -> None:
        self._backend = backend
        self._prompts = [tokenizer.encode(text, add_special_tokens=False) for text in prompts(tokenizer)]
        self._number = 0
        self.sampling_seconds = 0.0
        self.sequences: list[workloads.Sequence] = []

    async def step(self) -> int:
        """Tokens sampled."""
        from tinker import types

        started = time.process_time()
        client = await self._backend.snapshot_sampling_client()
        first, self._number = self._number * GROUPS_PER_STEP, self._number + 1
        chosen = [self._prompts[(first + index) % len(self._prompts)] for index in range(GROUPS_PER_STEP)]
        params = types.SamplingParams(max_tokens=TOKENS, temperature=1.0, stop=[], seed=0)
        sampled = await asyncio.gather(
            *(client.sample_async(types.ModelInput.from_ints(prompt), GENERATIONS, params) for prompt in chosen)
        )
        self.sampling_seconds = time.process_time() - started
        groups = list(zip(chosen, sampled, strict=True))
        self.sequences = [
            ([*prompt, *each.tokens], [False] * len(prompt) + [True] * len(each.tokens))
            for prompt, of in groups
            for each in of.sequences
        ]
        data = [datum for prompt, of in groups for datum in _group(types, prompt, of.sequences)]
        await self._backend.forward_backward_async(data, loss_fn="importance_sampling")
        await self._backend.optim_step_async(types.AdamParams(learning_rate=RATE))
        return sum(len(sequence.tokens) for of in sampled for sequence in of.sequences)


async def ours(model: str, work: Path) -> None:
    """Steps of this package's backend."""
    from nat_plugin_evsys.backends.local import LocalBackend

    backend = await LocalBackend.create(
        model, rank=RANK, alpha=ALPHA, checkpoint_dir=work, untrained_logprobs=False, device="cpu"
    )
    steps = OurSteps(backend, (await backend.snapshot_sampling_client()).get_tokenizer())
    await steps.step()
    shape = _shape(backend.base.model.config)
    clock = Clock()
    while clock.asked():
        tokens = await steps.step()
        clock.answer(
            seconds=clock.seconds(),
            tokens=tokens,
            sampling_seconds=steps.sampling_seconds,
            sampling_flops=sampling_flops(steps.sequences, shape),
            training_flops=useful_flops(steps.sequences, shape, RANK),
            gemm=gemm_peak(shape),
            decode=decode_peak(shape, GROUPS_PER_STEP * GENERATIONS),
        )
    await backend.close()


def _shape(config: Any) -> Shape:
    """Of the model, as the FLOPs are counted for."""
    return Shape(
        vocab=config.vocab_size,
        hidden=config.hidden_size,
        inner=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
    )


@torch.no_grad()
def decode_peak(shape: Shape, rows: int) -> float:
    """FLOP/s of the fp32 products of one decode step of ``rows`` rows, with each weight by the fastest way.

    That is MKL, with the weight as it is or transposed, or oneDNN. Every layer has weights of its own, as in a decode
    step: they come from memory.
    """
    matrices = [(size, shape.layers) for sizes in shape.linears for size in sizes]
    flops = seconds = 0.0
    for (width, height), count in [*matrices, ((shape.hidden, shape.vocab), 1)]:
        x, weights = torch.randn(rows, width), [torch.randn(height, width) for _ in range(count)]
        flops += 2 * rows * height * width * count
        ways = [
            (torch.mm, [weight.T for weight in weights]),
            (torch.mm, [weight.T.contiguous() for weight in weights]),
            (partial(onednn_product, bias=None), [in_onednn_order(weight) for weight in weights]),
        ]
        seconds += min(_seconds(product, x, made) for product, made in ways for _ in range(4))
    return flops / seconds


def _seconds(product: Callable[[Tensor, Tensor], Tensor], x: Tensor, weights: list[Tensor]) -> float:
    started = time.process_time()
    for weight in weights:
        product(x, weight)
    return time.process_time() - started


def _group(types: Any, prompt: list[int], sequences: Sequence[Any]) -> list[Any]:
    """A group's Datums. An advantage: the reward less the group's mean, over its deviation and the step's tokens."""
    advantages = group_advantages([reward(sequence.tokens) for sequence in sequences], "group_mean_std")
    step_tokens = GROUPS_PER_STEP * GENERATIONS * TOKENS
    data = []
    for sequence, advantage in zip(sequences, advantages, strict=True):
        ids, before = [*prompt, *sequence.tokens], [0.0] * (len(prompt) - 1)
        inputs = {
            "target_tokens": ids[1:],
            "logprobs": [*before, *sequence.logprobs],
            "advantages": [*before, *[advantage / step_tokens] * len(sequence.tokens)],
        }
        data.append(types.Datum(types.ModelInput.from_ints(ids[:-1]), inputs))
    return data


def trl(model: str, work: Path) -> None:
    """Steps of TRL's trainer."""
    import trl_side

    sys.path.append(str(trl_side.FOLDER))
    from peers import load, lora
    from transformers import TrainerCallback
    from trl import GRPOTrainer

    network, tokenizer = load(0, model)
    sampled: list[int] = []

    def rewards(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        sampled.append(sum(map(len, completion_ids)))
        return [reward(ids) for ids in completion_ids]

    class Steps(TrainerCallback):  # type: ignore[misc]
        clock: Clock | None = None

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if self.clock is None:  # the first step loads code and kernels
                self.clock = Clock()
            else:
                self.clock.answer(seconds=self.clock.seconds(), tokens=sampled[-1])
            control.should_training_stop = not self.clock.asked()

    config = trl_side.grpo_config(
        work, RATE, TOKENS, max_steps=10_000, generation_kwargs={"min_new_tokens": TOKENS}, logging_strategy="no"
    )
    rows = [{"prompt": text} for text in prompts(tokenizer)]
    GRPOTrainer(
        model=network,
        reward_funcs=rewards,
        args=config,
        train_dataset=trl_side.dataset(rows, "quickstart"),
        processing_class=tokenizer,
        peft_config=lora(),
        callbacks=[Steps()],
    ).train()


def main() -> None:
    """``quickstart_worker.py ours|trl full|small``."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    role, size = sys.argv[1:3]
    with tempfile.TemporaryDirectory() as directory:
        if role == "ours":
            asyncio.run(ours(MODELS[size], Path(directory)))
        else:
            trl(MODELS[size], Path(directory))


if __name__ == "__main__":
    main()
