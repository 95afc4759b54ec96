"""What the peers share: the model with a LoRA adapter, replies by ``generate``, and the measuring."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from curve import RANK
from peft import LoraConfig, get_peft_model
from tasks import Row, Task
from transformers import AutoModelForCausalLM, AutoTokenizer

from nat_plugin_evsys.engine.model.builtin import ensure_builtin
from nat_plugin_evsys.engine.model.loading import default_cache_dir

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def lora() -> LoraConfig:
    """The same matrices as this engine's."""
    return LoraConfig(r=RANK, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM")


def load(seed: int, model: str = "builtin/smollm2-135m") -> tuple[Any, Any]:
    """A base model and its tokenizer."""
    torch.manual_seed(seed)
    directory = ensure_builtin(model, default_cache_dir())
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32), tokenizer


def load_with_lora(seed: int) -> tuple[Any, Any]:
    """The same with a fresh adapter."""
    model, tokenizer = load(seed)
    return get_peft_model(model, lora()), tokenizer


class Rollout:
    """One attempt: the prompt, and what follows with a mask of what the policy said."""

    def __init__(self, row: Row, prompt: list[int]) -> None:
        self.row = row
        self.prompt = prompt
        self.completion: list[int] = []
        self.said: list[int] = []
        self.reply = ""


@torch.no_grad()
def roll_out(model: Any, tokenizer: Any, task: Task, rows: Sequence[Row], *, greedy: bool = False) -> list[Rollout]:
    """One rollout of each of the rows, all in one batch a turn."""
    rollouts = [Rollout(row, ids(tokenizer, task.messages(row))) for row in rows]
    _reply(model, tokenizer, rollouts, task.max_tokens, greedy)
    if task.tool is not None:
        for each in rollouts:
            first = {"role": "assistant", "content": each.reply}
            told = {"role": "user", "content": task.tool(each.row, each.reply)}
            before = tokenizer.apply_chat_template([*task.messages(each.row), first], tokenize=False)
            after = tokenizer.apply_chat_template(
                [*task.messages(each.row), first, told], tokenize=False, add_generation_prompt=True
            )
            end = "" if each.completion[-1] == tokenizer.eos_token_id else tokenizer.eos_token
            turn = tokenizer.encode(end + "\n" + after[len(before) :].lstrip("\n"), add_special_tokens=False)
            each.completion += turn
            each.said += [0] * len(turn)
        _reply(model, tokenizer, rollouts, task.max_tokens, greedy)
    return rollouts


def heldout_reward(model: Any, tokenizer: Any, task: Task) -> float:
    """Mean reward of one greedy reply to each held-out row."""
    model.eval()
    rollouts = roll_out(model, tokenizer, task, task.heldout, greedy=True)
    model.train()
    return sum(task.reward(each.row, each.reply) for each in rollouts) / len(rollouts)


def ids(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """The prompt as the chat template has it."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer.encode(text, add_special_tokens=False))


def _reply(model: Any, tokenizer: Any, rollouts: list[Rollout], max_tokens: int, greedy: bool) -> None:
    sequences = [each.prompt + each.completion for each in rollouts]
    batch = tokenizer.pad({"input_ids": sequences}, return_tensors="pt", padding_side="left")
    options = {"do_sample": False} if greedy else {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
    output = model.generate(
        **batch, max_new_tokens=max_tokens, pad_token_id=tokenizer.pad_token_id, generation_config=None, **options
    )
    end = tokenizer.eos_token_id
    for each, sequence in zip(rollouts, output[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
        reply = sequence[: sequence.index(end) + 1] if end in sequence else sequence
        each.completion += reply
        each.said += [1] * len(reply)
        each.reply = tokenizer.decode(reply, skip_special_tokens=True)
