"""Models whose replies are known beforehand, so that no test hangs on what random weights happen to say.

Each function changes a model of ``tiny.tiny_model("qwen3", tie_word_embeddings=False)`` in place and returns it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

_SURE = 40.0
"""Least distance in logits from what is to be said to anything else: nothing else is ever sampled."""


@torch.no_grad()
def reciting(model: PreTrainedModel, tokens: Sequence[int]) -> PreTrainedModel:
    """After ``tokens[i]`` it says ``tokens[i + 1]`` and after the last one the first one, at any temperature up to 1.

    The layers add nothing to the embedding of the last token, and the output head has one row for each step.

    Raises:
        ValueError: a token occurs twice, or the model is too narrow to tell the tokens apart.
    """
    if len(set(tokens)) < len(tokens):
        raise ValueError(f"a token occurs twice in {list(tokens)}")
    embedding, head = _untied(model)
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.zero_()
    hidden: Tensor = _final_norm(model)(embedding[list(tokens)])
    followers = [*tokens[1:], tokens[0]]
    head.zero_()
    head[followers] = hidden
    logits = hidden @ head.T
    said = logits[range(len(tokens)), followers].clone()
    logits[range(len(tokens)), followers] = float("-inf")
    closest = float((said - logits.max(dim=-1).values).min())
    if closest <= 0:
        raise ValueError(f"{len(tokens)} tokens are too many for {hidden.shape[1]} dimensions")
    head *= _SURE / closest
    return model


@torch.no_grad()
def never_saying(model: PreTrainedModel, *tokens: int) -> PreTrainedModel:
    """A model with random weights that has no probability for ``tokens``, whatever it read.

    The first dimension of its hidden states is a positive constant, which only the rows of ``tokens`` read.
    """
    embedding, head = _untied(model)
    embedding[:, 0] = 1.0
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter[0] = 0.0
    head[:, 0] = 0.0
    head[list(tokens)] = 0.0
    head[list(tokens), 0] = -1e4
    return model


@torch.no_grad()
def undecided(model: PreTrainedModel) -> PreTrainedModel:
    """All tokens are equally likely after anything: the logits are zero exactly, in whatever way they are computed."""
    _final_norm(model).get_parameter("weight").zero_()
    return model


def _final_norm(model: PreTrainedModel) -> nn.Module:
    return model.get_submodule("model.norm")


def _untied(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """The weights ``(V, hidden)`` of the embedding and of the output head."""
    embedding, head = (model.get_parameter(f"{name}.weight") for name in ("model.embed_tokens", "lm_head"))
    if embedding is head:
        raise ValueError("the model's output head is its embedding: make it with tie_word_embeddings=False")
    return embedding, head
