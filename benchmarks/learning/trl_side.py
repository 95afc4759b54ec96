"""TRL's GRPOTrainer with its own defaults, but for the batch, the group size and the learning rate that are compared.

TRL is no dependency of this package. It is imported from ``benchmarks/out/trl``; see README.md.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from curve import GENERATIONS, GROUPS_PER_STEP, Point
from peers import heldout_reward, load, lora, roll_out
from tasks import ROOT, Task

FOLDER = ROOT / "benchmarks" / "out" / "trl"

MICRO_BATCH = 16
"""Sequences of one forward and backward pass; all 64 of a step at once take 11 GB."""


def grpo_config(work: Path, rate: float, max_tokens: int, **others: Any) -> Any:
    """TRL's defaults on the CPU, with the batch and the group size of the comparison; ``FOLDER`` is importable."""
    from trl import GRPOConfig

    return GRPOConfig(
        output_dir=str(work),
        learning_rate=rate,
        per_device_train_batch_size=MICRO_BATCH,
        gradient_accumulation_steps=GENERATIONS * GROUPS_PER_STEP // MICRO_BATCH,
        num_generations=GENERATIONS,
        max_completion_length=max_tokens,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **others,
    )


def dataset(rows: list[dict[str, Any]], name: str) -> Any:
    """TRL's form of rows, with a fingerprint of its own: datasets 5 cannot compute one with each version of dill."""
    from datasets import Dataset
    from datasets.table import InMemoryTable

    return Dataset(InMemoryTable.from_pylist(rows), fingerprint=name)


def run(task: Task, rate: float, seed: int, work: Path, epochs: int) -> list[Point]:
    """The curve of one run."""
    sys.path.append(str(FOLDER))
    from transformers import TrainerCallback
    from trl import GRPOTrainer

    model, tokenizer = load(seed)
    rows = {row["id"]: row for row in task.train}

    def reward(prompts: Any, completions: Any, id: list[str], **others: Any) -> list[float]:
        replies = others.get("reply") or [messages[0]["content"] for messages in completions]
        return [task.reward(rows[key], reply) for key, reply in zip(id, replies, strict=True)]

    def two_turns(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        asked = [next(row for row in task.train if row["question"] == prompt[-1]["content"]) for prompt in prompts]
        unwrapped = trainer.accelerator.unwrap_model(trainer.model)
        rollouts = roll_out(unwrapped, tokenizer, task, asked)
        return {
            "prompt_ids": [each.prompt for each in rollouts],
            "completion_ids": [each.completion for each in rollouts],
            "logprobs": None,
            "env_mask": [each.said for each in rollouts],
            "reply": [each.reply for each in rollouts],
        }

    prompts = [{"id": row["id"], "prompt": task.messages(row)} for row in task.train]
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=grpo_config(work, rate, task.max_tokens, num_train_epochs=epochs, seed=seed, logging_steps=1),
        train_dataset=dataset(prompts, task.name),
        processing_class=tokenizer,
        peft_config=lora(),
        rollout_func=None if task.tool is None else two_turns,
    )
    curve: list[Point] = []

    class Watch(TrainerCallback):  # type: ignore[misc]
        seconds = 0.0
        started = 0.0

        def measure(self, epoch: int, sampled: float | None) -> None:
            heldout = heldout_reward(trainer.model, tokenizer, task)
            curve.append(Point(epoch, heldout, sampled, round(self.seconds, 1)))

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.measure(0, None)
            self.started = time.monotonic()

        def on_epoch_end(self, *_: Any, **__: Any) -> None:
            self.seconds += time.monotonic() - self.started
            epoch = round(trainer.state.epoch)
            logs = [log["reward"] for log in trainer.state.log_history if "reward" in log][-per_epoch:]
            self.measure(epoch, sum(logs) / len(logs) if logs else None)
            self.started = time.monotonic()

    per_epoch = len(task.train) // GROUPS_PER_STEP
    trainer.add_callback(Watch())
    trainer.train()
    return curve
