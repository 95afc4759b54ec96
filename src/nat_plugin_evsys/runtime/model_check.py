"""What of a base model was seen to be right: the row of docs/models.md's table, and of ``nat evsys check``.

Nothing depends on a model's name. Each property is compared with an independent computation: PEFT's modules and plain
autograd for the gradient and the saved adapter, a pass over each sequence alone for the sampler.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tinker import types
from torch import Tensor

from nat_plugin_evsys.engine.gradient.fast_verdict import fast_forward
from nat_plugin_evsys.engine.gradient.trainable import TrainableModel
from nat_plugin_evsys.engine.model.forward import OutputHead, share_of_norm
from nat_plugin_evsys.engine.model.loading import BaseModel
from nat_plugin_evsys.engine.model.lora import LoraAdapter
from nat_plugin_evsys.engine.model.peft_check import load_in_peft, write_adapter
from nat_plugin_evsys.engine.model.peft_format import name_of_parameter
from nat_plugin_evsys.engine.model.targets import linear_roles
from nat_plugin_evsys.engine.model.vision import Vision
from nat_plugin_evsys.engine.sampler import Sampler
from nat_plugin_evsys.errors import EvsysError, one_line

_DATUMS, _PROMPTS = (19, 7, 40), (5, 23, 34)
_STEPS, _SAMPLED = 5, 6
_ADAM = types.AdamParams(learning_rate=1e-2)
_TIMEOUT_S = 600.0
_FP32, _HALF = 2e-3, 0.2


@dataclass(frozen=True)
class ModelRow:
    """One model's row. A cell is ``ok``, or a sentence that says what is wrong.

    Attributes:
        model: its name.
        refused: why the engine does not take it; the other cells are empty then.
        training, sampling: ``fast``, or ``plain: …`` with the reason.
        loss: whether it falls.
        gradient: against autograd through PEFT.
        sampler: reported logprobs against passes over the sampled sequences.
        adapter: logprobs of the saved adapter in PEFT.
    """

    model: str
    refused: str = ""
    training: str = ""
    sampling: str = ""
    loss: str = ""
    gradient: str = ""
    sampler: str = ""
    adapter: str = ""

    @property
    def is_right(self) -> bool:
        """Whether everything is, or the model is refused; if not, something would go wrong without a word."""
        cells = (self.loss, self.gradient, self.sampler, self.adapter)
        return bool(self.refused) or all(cell == "ok" for cell in cells)


def check_model(base: BaseModel, *, rank: int = 4) -> ModelRow:
    """Train an adapter for five steps, and compare. Takes a second for a toy, minutes for a large model."""
    row = ModelRow(base.name)
    try:
        roles = set(linear_roles(base.model).values())
        flags = {f"train_{role}": role in roles for role in ("attn", "mlp", "unembed")}
        adapter = LoraAdapter.create(base.model, rank=rank, alpha=2.0 * rank, **flags)
        fast, why = fast_forward(base, OutputHead(base.model))
        model = TrainableModel(base, adapter)
        row = replace(row, training="fast" if fast else f"plain: {why}", loss=_loss_falls(model))
        gradient, in_peft = _against_peft(model)
        row = replace(row, gradient=gradient, adapter=in_peft)
        return _against_sampler(model, row)
    except EvsysError as exc:
        return ModelRow(base.name, refused=str(exc))


def _loss_falls(model: TrainableModel) -> str:
    losses = []
    for _ in range(_STEPS):
        losses.append(float(model.forward_backward(_data(model.base), "cross_entropy").metrics["loss:sum"]))
        model.optim_step(_ADAM)
    last = float(model.forward(_data(model.base), "cross_entropy").metrics["loss:sum"])
    return "ok" if last < losses[0] else f"the loss went from {losses[0]:.3g} to {last:.3g}"


def _against_peft(model: TrainableModel) -> tuple[str, str]:
    """Cells ``gradient`` and ``adapter``."""
    base, data = model.base, _data(model.base)
    output = model.forward_backward(data, "cross_entropy")
    found = dict(model.gradient or {})
    logprobs = torch.cat([out["logprobs"].to_torch() for out in output.loss_fn_outputs])
    try:
        with tempfile.TemporaryDirectory() as directory:
            write_adapter(Path(directory), base, model.adapter)
            loaded = load_in_peft(base.model, Path(directory), trainable=True)
        with torch.no_grad():
            as_loaded = torch.cat([_peft_logprobs(loaded, base, datum) for datum in data])
        _give(loaded, model.adapter)
        (-torch.cat([_peft_logprobs(loaded, base, datum) for datum in data]).sum()).backward()
    except Exception as exc:  # noqa: BLE001 - boundary: PEFT and the model's code raise what they like
        return f"not compared: {one_line(exc)}", f"PEFT does not load it: {one_line(exc)}"
    finally:
        model.discard_gradient()
    theirs = {name_of_parameter(n): p.grad for n, p in loaded.named_parameters()}
    wanted = {n: theirs.get(n) for n in found}
    adapter = _cell(base, logprobs, as_loaded.cpu(), "PEFT's logprobs are")
    lost = [n for n, g in wanted.items() if g is None and bool(found[n].any())]
    if lost:
        return f"PEFT has no {lost[0]}", adapter
    ours = torch.cat([found[n].flatten().cpu() for n, g in wanted.items() if g is not None])
    reference = torch.cat([g.flatten().cpu() for g in wanted.values() if g is not None])
    return _cell(base, ours, reference, "the gradient is"), adapter


def _give(loaded: torch.nn.Module, adapter: LoraAdapter) -> None:
    """The adapter's matrices: what PEFT loses when it reads the file is no matter of the gradient."""
    ours = dict(adapter.named_tensors())
    with torch.no_grad():
        for name, parameter in loaded.named_parameters():
            matrix = ours.get(name_of_parameter(name))
            if matrix is not None:
                parameter.copy_(matrix)


def _peft_logprobs(loaded: torch.nn.Module, base: BaseModel, datum: types.Datum) -> Tensor:
    ids = torch.tensor(datum.model_input.to_ints(), device=base.device)
    targets = datum.loss_fn_inputs["target_tokens"].to_torch().to(base.device)
    logits: Tensor = loaded(input_ids=ids[None], use_cache=False).logits[0].float()
    return logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)


def _against_sampler(model: TrainableModel, row: ModelRow) -> ModelRow:
    base = model.base
    sampler = Sampler(base, max_batch_size=8)
    try:
        client = sampler.client(model.adapter, 1)
        params = types.SamplingParams(max_tokens=_SAMPLED, seed=3, stop=[])
        room = base.context_length - _SAMPLED
        prompts = [_ids(base, min(n, room), seed=n) for n in _PROMPTS]
        futures = [client.sample(types.ModelInput.from_ints(p), 1, params) for p in prompts]
        sequences = [f.result(_TIMEOUT_S).sequences[0] for f in futures]
        scored = client.compute_logprobs(types.ModelInput.from_ints(prompts[-1])).result(_TIMEOUT_S)
    finally:
        sampler.close()
    # Each token after just what came before it: a rotary table may depend on the length.
    wholes = [(p, s.tokens[:n]) for p, s in zip(prompts, sequences, strict=True) for n in range(1, len(s.tokens) + 1)]
    data = [_datum([*p, *sampled]) for p, sampled in wholes]
    outputs = model.forward([*data, _datum(prompts[-1])], "cross_entropy").loss_fn_outputs
    *of_samples, of_prompt = (out["logprobs"].to_torch() for out in outputs)
    expected = torch.cat([torch.stack([lp[-1] for lp in of_samples]), of_prompt])
    reported = [lp for s in sequences for lp in s.logprobs or []]
    found = torch.tensor([*reported, *(lp for lp in scored[1:] if lp is not None)])
    cell = _cell(base, found, expected, "its logprobs are")
    why = sampler.plain_because
    return replace(row, sampling=f"plain: {why}" if why else "fast", sampler=cell)


def _cell(base: BaseModel, found: Tensor, expected: Tensor, what: str) -> str:
    gap = share_of_norm(found, expected)
    return "ok" if gap <= (_FP32 if base.dtype == torch.float32 else _HALF) else f"{what} off by {gap:.1e} of the norm"


def _data(base: BaseModel) -> list[types.Datum]:
    return [_datum(_ids(base, min(n, base.context_length) + 1, seed=100 + n)) for n in _DATUMS]


def _datum(tokens: Sequence[int]) -> types.Datum:
    targets = types.TensorData.from_torch(torch.tensor(tokens[1:]))
    return types.Datum(types.ModelInput.from_ints(list(tokens[:-1])), {"target_tokens": targets})


def _ids(base: BaseModel, count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    drawn: list[int] = torch.randint(base.vocab_size, (count,), generator=generator).tolist()
    # Text must not have what stands for an image.
    return [each - (isinstance(base.vision, Vision) and each == base.vision.token) for each in drawn]
