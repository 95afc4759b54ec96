"""What the engine is measured against: transformers alone, in float64, with the adapter merged into the weights.

Nothing here calls the engine: the model is read from disk again, a batch is one right-padded tensor with an attention
mask, LoRA is ``W + alpha / rank * B A`` and every gradient is plain autograd's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

Matrices = dict[str, tuple[Tensor, Tensor]]


class PlainModel:
    """A float64 model with eager experts."""

    def __init__(self, path: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
        self.model.eval().requires_grad_(False)
        if any("experts" in name for name, _ in self.model.named_modules()):
            self.model.set_experts_implementation("eager")
        self._windowed = "sliding_attention" in (getattr(self.model.config, "layer_types", None) or [])

    def log_softmax(
        self, sequences: Sequence[Sequence[int]], matrices: Matrices, scale: float, temperature: float = 1.0
    ) -> Tensor:
        """``[D, T, V]`` log-probabilities of the next token, with a gradient by ``matrices``."""
        rows = [torch.tensor(list(s)) for s in sequences]
        ids = pad_sequence(rows, batch_first=True)
        mask = pad_sequence([torch.ones_like(r) for r in rows], batch_first=True)
        if self._windowed:
            # Padding further than a window from the last real token would see no key at all and become NaN.
            mask = torch.ones_like(mask)
        merged = {
            f"{name}.weight": self.model.get_parameter(f"{name}.weight") + scale * (b @ a)
            for name, (a, b) in matrices.items()
        }
        inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        # A delta on a tied unembedding moves the logits only, hence no tying of the merged weights.
        out = torch.func.functional_call(self.model, merged, kwargs=inputs, tie_weights=False)
        return torch.log_softmax(out.logits / temperature, dim=-1)


def double_leaves(weights: Mapping[str, tuple[Tensor, Tensor]]) -> Matrices:
    """Float64 copies of LoRA matrices that require grad."""

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().double().clone().requires_grad_()

    return {name: (leaf(a), leaf(b)) for name, (a, b) in weights.items()}


def gradients(loss: Tensor, matrices: Matrices) -> dict[str, Tensor]:
    """``d loss`` by each matrix, zero where the loss does not depend on it, under the engine's names."""
    flat = {f"{n}.lora_{side}.weight": t for n, pair in matrices.items() for side, t in zip("AB", pair, strict=True)}
    found = torch.autograd.grad(loss, list(flat.values()), allow_unused=True)
    return {name: torch.zeros_like(t) if g is None else g for (name, t), g in zip(flat.items(), found, strict=True)}


def padded(rows: Sequence[Tensor], width: int) -> Tensor:
    """Rows of shape (n,) or (n, K) as one float64 or int64 tensor ``[D, width, ...]``, filled up with zeros."""
    out = pad_sequence(list(rows), batch_first=True)
    out = torch.cat([out, out.new_zeros(len(rows), width - out.shape[1], *out.shape[2:])], dim=1)
    return out.double() if out.is_floating_point() else out
