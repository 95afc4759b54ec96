"""Two processes, each with its part of a model: python split_program.py DIRECTORY OUTPUT."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tinker import types

from nat_plugin_evsys.engine.gradient import batching
from nat_plugin_evsys.engine.gradient.datums import check_datums
from nat_plugin_evsys.engine.gradient.micro_batches import Loss
from nat_plugin_evsys.engine.gradient.steps import Pass
from nat_plugin_evsys.engine.gradient.trainable import TrainableModel
from nat_plugin_evsys.engine.model.loading import BaseModel, load_base_model
from nat_plugin_evsys.engine.model.lora import LoraAdapter
from nat_plugin_evsys.replicas.passes import Order, Passes
from nat_plugin_evsys.replicas.weights import flatten, shape_of
from nat_plugin_evsys.runtime.bases import SharedBase

PARTS = 2


def data(vocab: int) -> list[types.Datum]:
    """Three Datums of different lengths, one of them at another temperature."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for length, temperature in ((9, 1.0), (14, 0.7), (20, 1.0)):
        ids = torch.randint(0, vocab, (length,), generator=generator)
        inputs: dict[str, Any] = {
            "target_tokens": ids[1:],
            "weights": torch.rand(length - 1, generator=generator),
            "temperature": torch.full((length - 1,), temperature),
        }
        tensors = {name: types.TensorData.from_torch(value) for name, value in inputs.items()}
        found.append(types.Datum(model_input=types.ModelInput.from_ints(ids[:-1].tolist()), loss_fn_inputs=tensors))
    return found


def computed(directory: str, parts: int) -> dict[str, Any]:
    """What a pass over ``data`` gives, with B perturbed."""
    base = load_base_model(directory, device="cpu", dtype="float32", parts=parts)
    adapter = LoraAdapter.create(base.model, rank=4, alpha=8, seed=1, train_unembed=True)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, tensor in adapter.named_tensors():
            tensor += 0.05 * torch.randn(tensor.shape, generator=generator)
    model = TrainableModel(base, adapter)
    datums = data(base.vocab_size)
    forward = model.forward(datums, "cross_entropy")
    bare = model.base_forward(datums)
    both = model.forward_backward(datums, "cross_entropy")
    found = {"forward": forward, "bare": bare, "both": both}
    shapes = {name: tuple(getattr(p, "to_local", lambda p=p: p)().shape) for name, p in base.model.named_parameters()}
    return {
        "logprobs": {n: [o["logprobs"].to_torch() for o in output.loss_fn_outputs] for n, output in found.items()},
        "gradient": dict(model.gradient or {}),
        "identity": base.identity,
        "shapes": shapes,
        "plain_tokens": both.metrics["plain_path_tokens:sum"],
        "order": ordered(base, adapter),
    }


def ordered(base: BaseModel, adapter: LoraAdapter) -> dict[str, Any]:
    """What a replica's order of many Datums gives."""
    given = {"vocab_size": base.vocab_size, "context_length": base.context_length, "vision": base.vision}
    examples = check_datums(data(base.vocab_size) * 16, "cross_entropy", **given)  # type: ignore[arg-type]
    of = Pass(Loss("cross_entropy", {}), backward=True)
    order = Order(shape_of(adapter), "", flatten(adapter), examples, of)
    _, found = Passes(SharedBase(base)).run(order)
    logprobs = [datum.logprobs.detach() for datum in found.datums]
    return {"logprobs": logprobs, "gradient": found.gradient, "parts": found.metrics["micro_batches:sum"]}


def part(rank: int, directory: str, output: str) -> None:
    """One process of the group; the second one has less memory free."""
    if rank:
        batching._CPU_ACTIVATION_BYTES = 0
    store = f"file://{output}/group"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=PARTS)
    torch.save(computed(directory, PARTS), Path(output) / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(part, args=(sys.argv[1], sys.argv[2]), nprocs=PARTS)  # type: ignore[attr-defined, no-untyped-call]
