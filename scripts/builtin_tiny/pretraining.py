"""Full-parameter training on the chats: half a minute on one core."""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from builtin_tiny.chats import Message, chats

PROMPT_WEIGHT = 0.1
"""Weight of a prompt's tokens in the loss; those of a reply weigh 1."""


def pretrain(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, seed: int, steps: int, batch_tokens: int, lr: float
) -> None:
    """Train all weights in place with AdamW; the learning rate warms up over 20 steps and falls in the last third.

    Args:
        batch_tokens: padded tokens per step, at the most.
    """
    rng = random.Random(seed)
    batches = _batches([_encode(tokenizer, *chat) for chat in chats(seed, 2500)], batch_tokens)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    order: list[int] = []
    model.train()
    for step in range(steps):
        if not order:
            order = rng.sample(range(len(batches)), len(batches))
        rate = lr * min(1.0, (step + 1) / 20) * min(1.0, (steps - step) / (0.3 * steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = _loss(model, *_pad(batches[order.pop()]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    model.zero_grad()


def _encode(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: list[Any] | None
) -> tuple[list[int], list[float]]:
    """``(ids, weights)`` of a chat, both of its length."""

    def ids(upto: int, prompt: bool) -> list[int]:
        text = tokenizer.apply_chat_template(messages[:upto], tools=tools, tokenize=False, add_generation_prompt=prompt)
        return tokenizer(text)["input_ids"]

    full = ids(len(messages), False)
    weights = [PROMPT_WEIGHT] * len(full)
    for position, message in enumerate(messages):
        if message["role"] == "assistant":
            start, stop = len(ids(position, True)), len(ids(position + 1, False)) - 1  # the last is the line end
            weights[start:stop] = [1.0] * (stop - start)
    return full, weights


def _batches(rows: list[tuple[list[int], list[float]]], budget: int) -> list[list[tuple[list[int], list[float]]]]:
    """Rows of like length together, as many as fit the budget when padded."""
    batches: list[list[tuple[list[int], list[float]]]] = [[]]
    for row in sorted(rows, key=lambda row: len(row[0])):
        if batches[-1] and len(row[0]) * (len(batches[-1]) + 1) > budget:
            batches.append([])
        batches[-1].append(row)
    return batches


def _pad(rows: list[tuple[list[int], list[float]]]) -> tuple[Tensor, Tensor]:
    """``ids (B, T)`` and ``weights (B, T)``, padded with zeros on the right."""
    length = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in rows])
    weights = torch.tensor([weights + [0.0] * (length - len(weights)) for _, weights in rows])
    return ids, weights


def _loss(model: PreTrainedModel, ids: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean negative log-likelihood of the next token."""
    logits = model(ids).logits[:, :-1]
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return (losses * weights[:, 1:].flatten()).sum() / weights[:, 1:].sum()
