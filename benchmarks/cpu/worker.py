"""One way to compute a training step, in a process of its own: reads a line of JSON, answers with a line of JSON.

``ours`` is this package; ``plain`` is the loop a PEFT user writes (padded batches of 8, all logits); ``trl`` computes
logits of the completion only and their log-softmax row by row, as TRL's trainers do. All have the same weights.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from workloads import FULL, SMALL, Sequence, Shape, workload

RANK, ALPHA, OLD_LOGPROB = 16, 32.0, -10.0
BATCH = 8


def build_model(shape: Shape) -> Any:
    """Qwen3 with random weights."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config)


def adapter_weights(names: list[tuple[str, tuple[int, ...]]]) -> dict[str, Tensor]:
    """The same A and B in every worker; B is not zero, or A would have no gradient."""
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator) * 0.03 for name, shape in sorted(names)}


def advantages(index: int, mask: list[bool]) -> list[float]:
    """Of one sign for a sequence, as in a group."""
    value = 1.0 if index % 2 else -0.7
    return [value if trained else 0.0 for trained in mask]


def ours(shape: Shape, path: str = "auto", lean: bool = False) -> Callable[[list[Sequence]], dict[str, Tensor]]:
    """This package's engine."""
    from tinker import types

    from nat_plugin_evsys.engine.lora import LoraAdapter
    from nat_plugin_evsys.engine.model import wrap_model
    from nat_plugin_evsys.engine.training import TrainableModel

    base = wrap_model("bench", build_model(shape), None)
    adapter = LoraAdapter.create(base.model, rank=RANK, alpha=ALPHA)
    named = dict(adapter.named_tensors())
    with torch.no_grad():
        for name, value in adapter_weights([(n, tuple(t.shape)) for n, t in named.items()]).items():
            named[name].copy_(value)
    model = TrainableModel(base, adapter, path=path, untrained_logprobs=not lean)  # type: ignore[arg-type]

    def step(data: list[Sequence]) -> dict[str, Tensor]:
        datums = [
            types.Datum(
                types.ModelInput.from_ints(ids[:-1]),
                {
                    "target_tokens": ids[1:],
                    "logprobs": [OLD_LOGPROB] * (len(ids) - 1),
                    "advantages": advantages(i, mask)[1:],
                },
            )
            for i, (ids, mask) in enumerate(data)
        ]
        metrics = model.forward_backward(datums, "importance_sampling").metrics
        assert path == "plain" or metrics["plain_path_tokens:sum"] == 0, metrics
        assert model.gradient is not None
        gradient = dict(model.gradient)
        model.discard_gradient()
        return gradient

    return step


def peft(shape: Shape, completion_only: bool) -> Callable[[list[Sequence]], dict[str, Tensor]]:
    """Hugging Face's model with PEFT's adapter, padded batches."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", lora_dropout=0.0)
    model = get_peft_model(build_model(shape), config)
    named = {_name(n): p for n, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, value in adapter_weights([(n, tuple(t.shape)) for n, t in named.items()]).items():
            named[name].copy_(value)

    def step(data: list[Sequence]) -> dict[str, Tensor]:
        for parameter in named.values():
            parameter.grad = None
        for start in range(0, len(data), BATCH):
            rows = list(enumerate(data))[start : start + BATCH]
            width = max(len(ids) for _, (ids, _) in rows)
            ids = torch.tensor([s + [0] * (width - len(s)) for _, (s, _) in rows])
            real = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for _, (s, _) in rows])
            weights = torch.tensor([advantages(i, m) + [0.0] * (width - len(m)) for i, (_, m) in rows])[:, 1:]
            if completion_only:
                first = min(m.index(True) for _, (_, m) in rows)
                # The logits at position t predict token t + 1.
                keep = width - max(1, first) + 1
                logits = model(input_ids=ids, attention_mask=real, logits_to_keep=keep).logits[:, :-1]
                targets, weights = ids[:, -keep + 1 :], weights[:, -keep + 1 :]
                logprobs = torch.stack(
                    [z.log_softmax(-1).gather(-1, t[:, None])[:, 0] for z, t in zip(logits, targets, strict=True)]
                )
            else:
                logits = model(input_ids=ids, attention_mask=real).logits[:, :-1]
                logprobs = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
            loss = -(torch.exp(logprobs - OLD_LOGPROB) * weights).sum()
            loss.backward()
        return {name: p.grad for name, p in named.items() if p.grad is not None}

    return step


def _name(peft_name: str) -> str:
    return peft_name.removeprefix("base_model.model.").replace(".default", "")


def gemm_peak(shape: Shape) -> float:
    """FLOP/s of this thread's best fp32 matrix product of the model's own shape, best of some."""
    a, b = torch.randn(4096, shape.hidden), torch.randn(shape.hidden, shape.inner)
    out = torch.empty(4096, shape.inner)
    best = float("inf")
    for _ in range(8):
        start = time.process_time()
        torch.mm(a, b, out=out)
        best = min(best, time.process_time() - start)
    return 2 * 4096 * shape.hidden * shape.inner / best


ROLES: dict[str, Callable[[Shape], Callable[[list[Sequence]], dict[str, Tensor]]]] = {
    "ours": ours,
    "ours_lean": lambda shape: ours(shape, lean=True),
    "plain": lambda shape: peft(shape, completion_only=False),
    "trl": lambda shape: peft(shape, completion_only=True),
}


def main() -> None:
    """``worker.py ROLE full|small``: requests are ``{"workload": name, "save": path or null}``."""
    torch.set_num_threads(1)
    shape = SMALL if sys.argv[2] == "small" else FULL
    step = ROLES[sys.argv[1]](shape)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        data = workload(request["workload"], shape)
        start = time.process_time()
        gradient = step(data)
        seconds = time.process_time() - start
        if request.get("save"):
            torch.save(gradient, request["save"])
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        peak = gemm_peak(shape) if request.get("gemm") else None
        print(json.dumps({"seconds": seconds, "peak_kib": used, "gemm": peak}), flush=True)


if __name__ == "__main__":
    main()
