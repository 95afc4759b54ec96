"""A plain loop in PyTorch and PEFT, as one writes it without a library: GRPO's advantages, one Adam step a batch."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import torch
from curve import GENERATIONS, GROUPS_PER_STEP, Point
from peers import Rollout, heldout_reward, load_with_lora, roll_out
from tasks import Task


def run(task: Task, rate: float, seed: int, _work: Path, epochs: int) -> list[Point]:
    """The curve of one run."""
    model, tokenizer = load_with_lora(seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    shuffled = random.Random(seed)
    curve, seconds = [Point(0, heldout_reward(model, tokenizer, task), None, 0.0)], 0.0
    for epoch in range(1, epochs + 1):
        started, rewards = time.monotonic(), []
        rows = shuffled.sample(task.train, len(task.train))
        for first in range(0, len(rows), GROUPS_PER_STEP):
            batch = [row for row in rows[first : first + GROUPS_PER_STEP] for _ in range(GENERATIONS)]
            rollouts = roll_out(model, tokenizer, task, batch)
            reward = torch.tensor([task.reward(each.row, each.reply) for each in rollouts])
            rewards.append(float(reward.mean()))
            groups = reward.view(-1, GENERATIONS)
            advantage = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten()
            step(model, optimizer, rollouts, advantage, tokenizer.pad_token_id)
        seconds += time.monotonic() - started
        heldout = heldout_reward(model, tokenizer, task)
        curve.append(Point(epoch, heldout, sum(rewards) / len(rewards), round(seconds, 1)))
    return curve


def step(model: Any, optimizer: Any, rollouts: list[Rollout], advantage: torch.Tensor, pad: int) -> None:
    """One step on ``-sum(A log p) / sum(tokens)`` over what the policy said; on-policy, so without a ratio."""
    length = max(len(each.prompt) + len(each.completion) for each in rollouts)
    tokens, real, said = (torch.full((len(rollouts), length), fill) for fill in (pad, 0, 0))
    for row, each in enumerate(rollouts):
        whole, start = each.prompt + each.completion, len(each.prompt)
        tokens[row, : len(whole)], real[row, : len(whole)] = torch.tensor(whole), 1
        said[row, start : len(whole)] = torch.tensor(each.said)
    optimizer.zero_grad()
    for part in torch.arange(len(rollouts)).split(16):
        logits = model(input_ids=tokens[part], attention_mask=real[part]).logits[:, :-1]
        logprobs = torch.log_softmax(logits, -1).gather(-1, tokens[part, 1:, None]).squeeze(-1)
        loss = -(advantage[part, None] * logprobs * said[part, 1:]).sum() / said.sum()
        loss.backward()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.step()
