"""Runs a step in parts that fit in memory: planned, then run forward (and backward) one after another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nat_plugin_evsys.engine.gradient.batching import default_token_budget, plan_micro_batches
from nat_plugin_evsys.engine.gradient.datums import Example
from nat_plugin_evsys.engine.gradient.fast_forward import FastForward, Reads, temperature_of
from nat_plugin_evsys.engine.gradient.fast_verdict import fast_forward
from nat_plugin_evsys.engine.gradient.losses import LOSSES, gradient_rows, read_rows
from nat_plugin_evsys.engine.gradient.packing import Pack, plan_packs
from nat_plugin_evsys.engine.gradient.results import DatumResult, split_rows, stack_targets
from nat_plugin_evsys.engine.machine.memory import MemoryModel, SavedBytes, TokenLimits, peak_bytes
from nat_plugin_evsys.engine.model.forward import OutputHead, hidden_rows, target_logprobs
from nat_plugin_evsys.engine.model.loading import BaseModel
from nat_plugin_evsys.engine.model.lora import LoraAdapter, applied
from nat_plugin_evsys.engine.model.vision import Vision
from nat_plugin_evsys.engine.tree.trie import Ids, TokenTrie

# In forward passes: one and a backward pass of two, and once more for what is computed again.
_PASSES, _RECOMPUTED_PASSES = 3, 4


@dataclass(frozen=True)
class Loss:
    """A loss function by name with its complete config.

    Attributes:
        all_logprobs: logprobs are wanted at positions that the loss does not read, too.
    """

    name: str
    config: Mapping[str, float]
    all_logprobs: bool = True

    def reads(self, example: Example) -> Reads:
        """What it reads of a Datum."""
        gradient = gradient_rows(self.name, example.inputs, self.config)
        if self.all_logprobs:
            return Reads(torch.ones_like(gradient), gradient)
        return Reads(read_rows(self.name, example.inputs, self.config), gradient)


@dataclass
class MicroBatch:
    """Datums that are computed together.

    Attributes:
        members: their indices in the step.
        computed: tokens that the decoder computes, padding apart; 0 where nothing is read of any member.
        trie: over what is read of them; None on the plain path.
        predicted, kept: bytes for the backward pass, before and after the forward pass; 0 where not known.
        recompute: keep the layers' inputs only and compute each layer again in the backward pass.
    """

    members: list[int]
    computed: int
    trie: TokenTrie | None = None
    predicted: float = 0.0
    kept: int = 0
    recompute: bool = False


class MicroBatches:
    """Plans and runs the parts of steps of one adapter.

    The fast path takes every Datum it can; the others, or all with ``path="plain"``, run in padded batches. Those with
    images run one by one.
    """

    def __init__(self, base: BaseModel, adapter: LoraAdapter, path: Literal["auto", "plain"]) -> None:
        self._base = base
        self._adapter = adapter
        self._parameters = dict(adapter.named_tensors())
        self._head = OutputHead(base.model)
        self._fast: FastForward | None = fast_forward(base, self._head)[0] if path == "auto" else None
        self._memory: dict[bool, MemoryModel] = {}
        self._limits: dict[bool, TokenLimits] = {}

    def plan(self, examples: Sequence[Example], loss: Loss, token_budget: int | None) -> list[MicroBatch]:
        """Every Datum is in exactly one micro-batch."""
        reads = [loss.reads(e) for e in examples]
        unread = [i for i, r in enumerate(reads) if r.length == 0]
        batches = [MicroBatch(unread, 0)] if unread else []
        fast: list[int] = []
        if self._fast is not None:
            size = [self._fast.computed_tokens(len(e), r.length) for e, r in zip(examples, reads, strict=True)]
            text = [i for i, r in enumerate(reads) if r.length and not examples[i].images]
            fast = [i for i in text if self._fast.takes(size[i])]
            for group in self._fast.one_table_each(fast, size):
                batches += self._packed(group, [examples[i].tokens[: size[i]].numpy() for i in group], token_budget)
        seeing = [i for i, r in enumerate(reads) if r.length and examples[i].images]
        batches += [MicroBatch([i], len(examples[i])) for i in seeing]
        plain = sorted(set(range(len(examples))) - {*fast, *unread, *seeing})
        budget = token_budget or default_token_budget(self._base)
        for group in plan_micro_batches([len(examples[i]) for i in plain], budget):
            members = [plain[i] for i in group]
            batches.append(MicroBatch(members, sum(len(examples[i]) for i in members)))
        return batches

    def _packed(self, members: Sequence[int], sequences: Sequence[Ids], token_budget: int | None) -> list[MicroBatch]:
        packs, recompute = self._packs(sequences, token_budget)
        batches = []
        for pack in packs:
            predicted = self._model_of(recompute).predict(len(pack.trie))
            of_pack = [members[i] for i in pack.members]
            batches.append(MicroBatch(of_pack, len(pack.trie), pack.trie, predicted, recompute=recompute))
        return batches

    def _packs(self, sequences: Sequence[Ids], token_budget: int | None) -> tuple[list[Pack], bool]:
        """The cheaper of two ways, and whether it is the second: packs that keep everything for the backward pass, or
        bigger ones, which repeat fewer tokens, that keep their layers' inputs only."""
        assert self._fast is not None
        if token_budget is not None:
            limits = TokenLimits(token_budget, token_budget).up_to(self._fast.most_rows)
            return plan_packs(sequences, limits), False
        most = self._limits_of(False).most
        packs = plan_packs(sequences, self._limits_of(False))
        if self._fast.recomputed == 0 or (len(packs) == 1 and len(packs[0].trie) <= most):
            return packs, False
        bigger = plan_packs(sequences, self._limits_of(True))
        rows, rows_of_bigger = (sum(len(p.trie) for p in of) for of in (packs, bigger))
        too_big = any(len(p.trie) > most for p in packs)
        if too_big or _RECOMPUTED_PASSES * rows_of_bigger < _PASSES * rows:
            return bigger, True
        return packs, False

    def _model_of(self, recompute: bool) -> MemoryModel:
        assert self._fast is not None
        if recompute not in self._memory:
            self._memory[recompute] = self._fast.memory_model(self._adapter, keep=not recompute)
        return self._memory[recompute]

    def _limits_of(self, recompute: bool) -> TokenLimits:
        assert self._fast is not None
        # On the CPU freed memory stays with the process (``allocator``) and would count as taken: so ask only once.
        if recompute not in self._limits or self._base.device.type != "cpu":
            limits = self._model_of(recompute).limits(self._base.device)
            self._limits[recompute] = limits.up_to(self._fast.most_rows)
        return self._limits[recompute]

    def run(
        self,
        batch: MicroBatch,
        examples: Sequence[Example],
        loss: Loss,
        gradient: dict[str, Tensor],
        *,
        bare: bool = False,
    ) -> list[DatumResult]:
        """Forward, and backward if ``gradient`` has tensors to add to; results in the order of ``batch.members``.

        ``bare``: without the adapter.
        """
        part = [examples[i] for i in batch.members]
        reads = [loss.reads(e) for e in part]
        device = self._base.device
        inputs = [{key: value.to(device) for key, value in e.inputs.items()} for e in part]
        needs_grad = bool(gradient) and any(bool(r.gradient.any()) for r in reads)
        saved = SavedBytes([*self._base.model.parameters(), *self._parameters.values()])
        with torch.set_grad_enabled(needs_grad), saved.counting():
            found = self._logprobs(batch, part, reads, None if bare else self._adapter)
            results = [LOSSES[loss.name].function(lp, i, loss.config) for (lp, _), i in zip(found, inputs, strict=True)]
            total = torch.stack([r.loss for r in results]).sum()
        batch.kept = saved.total
        if total.requires_grad:
            grads = torch.autograd.grad(total, list(self._parameters.values()), allow_unused=True)
            for name, grad in zip(self._parameters, grads, strict=True):
                if grad is not None:
                    gradient[name] += grad
        return [DatumResult(lp, r, h) for (lp, h), r in zip(found, results, strict=True)]

    def _logprobs(
        self, batch: MicroBatch, examples: Sequence[Example], reads: Sequence[Reads], adapter: LoraAdapter | None
    ) -> list[tuple[Tensor, Tensor]]:
        """Logprobs, in the shape of the targets, and entropies (N,) of each Datum."""
        if not batch.computed:
            device = self._base.device
            return [(torch.zeros(e.targets.shape, device=device), torch.zeros(len(e), device=device)) for e in examples]
        if batch.trie is not None and self._fast is not None:
            return self._fast.logprobs(adapter, batch.trie, examples, reads, keep=not batch.recompute)
        return self._padded(examples, reads, adapter)

    def _padded(
        self, examples: Sequence[Example], reads: Sequence[Reads], adapter: LoraAdapter | None
    ) -> list[tuple[Tensor, Tensor]]:
        """The plain way."""
        device = self._base.device
        with applied(adapter, fused=False):
            hidden = self._hidden(examples)
        temperature = None
        if any(e.temperature is not None for e in examples):
            temperature = torch.cat([temperature_of(e) for e in examples]).to(device)
        targets = stack_targets(examples).to(device)
        needs_grad = torch.cat([r.gradient for r in reads]).to(device)
        logprobs, entropy = target_logprobs(self._head, adapter, hidden, targets, needs_grad, temperature)
        entropies = entropy.split([len(e) for e in examples])
        return list(zip(split_rows(logprobs, examples), entropies, strict=True))

    def _hidden(self, examples: Sequence[Example]) -> Tensor:
        """Last hidden states of all tokens, [sum of lengths, H]; one with images is alone in its micro-batch."""
        vision = self._base.vision
        if isinstance(vision, Vision) and examples[0].images:
            (example,) = examples
            return vision.hidden(example.tokens, example.images)
        return hidden_rows(self._base.model, [e.tokens for e in examples], self._base.device)

    def metrics(self, batches: Sequence[MicroBatch], examples: Sequence[Example]) -> dict[str, float]:
        """The work metrics of ``TrainableModel.forward_backward``."""
        plain = sum(b.computed for b in batches if b.trie is None)
        metrics = {
            "datum_tokens:sum": float(sum(len(e) for e in examples)),
            "computed_tokens:sum": float(sum(b.computed for b in batches)),
            "plain_path_tokens:sum": float(plain),
            "micro_batches:sum": float(len(batches)),
            "recomputed_tokens:sum": float(sum(b.computed for b in batches if b.recompute)),
        }
        trained = [b for b in batches if b.kept]
        if trained:
            metrics["memory_peak_bytes:max"] = float(peak_bytes(self._base.device))
            metrics["activation_bytes:max"] = float(max(b.kept for b in trained))
        if any(b.predicted for b in trained):
            metrics["activation_predicted_bytes:max"] = max(b.predicted for b in trained)
        return metrics
