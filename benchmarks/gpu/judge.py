"""The engine's judge of the fast path in bf16: it must not refuse what is nearer to fp32 than the plain path is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from findings import Findings
from models import build_model, tensors_of
from place import Place
from torch import Tensor

from nat_plugin_evsys.engine.gradient.fast_forward import FastForward
from nat_plugin_evsys.engine.gradient.fast_verdict import fast_forward
from nat_plugin_evsys.engine.model.forward import OutputHead, hidden_rows
from nat_plugin_evsys.engine.model.loading import BaseModel, wrap_model
from nat_plugin_evsys.engine.model.lora import applied
from nat_plugin_evsys.engine.tree.attention import install
from nat_plugin_evsys.engine.tree.trie import Ids, TokenTrie


def run(findings: Findings, place: Place) -> None:
    """For both shapes, each with random weights that are the same in both precisions."""
    for title in ("0.6B", "4B"):
        with findings.attempt(f"{title} judge"):
            _judge(findings, place, title)


@torch.no_grad()
def _judge(findings: Findings, place: Place, title: str) -> None:
    shape = place.shape(title)
    base = wrap_model("bf16", build_model(shape, place.device, torch.bfloat16), None)
    family = _family(shape.vocab)
    head = OutputHead(base.model)
    refusal = fast_forward(base, head)[1]
    if refusal:
        print(f"  {title}: refused, since {refusal}", flush=True)
        install(base.model)  # so that what was refused can be measured
    fast, plain = _by_trie(FastForward(base, head), family), _padded(base, family)
    reference = build_model(shape, place.device, torch.float32, tensors_of(base.model))
    exact = _padded(wrap_model("fp32", reference, None), family)
    gaps = {
        name: float((found - exact).abs().max() / exact.abs().max())
        for name, found in (("fast", fast), ("plain", plain))
    }
    for name, gap in gaps.items():
        findings.figure(f"{title} {name} bf16 vs fp32", gap)
    findings.figure(f"{title} fast vs plain in bf16", float((fast - plain).abs().max() / plain.abs().max()))
    findings.exact(f"{title} refused though nearer to fp32", float(bool(refusal) and gaps["fast"] <= gaps["plain"]), 0)


def _family(vocabulary: int) -> list[Ids]:
    """Sequences that part at several places."""
    generator = np.random.default_rng(1)
    trunk = generator.integers(0, vocabulary, 48)
    lengths = ((48, 16), (48, 16), (30, 24), (48, 5), (0, 40))
    return [np.concatenate([trunk[:kept], generator.integers(0, vocabulary, own)]) for kept, own in lengths]


def _by_trie(fast: FastForward, family: Sequence[Ids]) -> Tensor:
    trie = TokenTrie.build(family)
    found = fast.hidden(trie, torch.arange(len(trie)), None).float()
    return found[torch.from_numpy(np.concatenate(trie.rows)).to(found.device)]


def _padded(base: BaseModel, family: Sequence[Ids]) -> Tensor:
    with applied(None):
        return hidden_rows(base.model, [torch.from_numpy(s) for s in family], base.device).float()
