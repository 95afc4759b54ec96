"""Decides whether a base model can use the fast forward pass, by comparing it once with the plain one."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from nat_plugin_evsys.engine.gradient.fast_forward import FastForward
from nat_plugin_evsys.engine.model.float32_twin import float32_twin
from nat_plugin_evsys.engine.model.forward import OutputHead, hidden_rows, share_of_norm
from nat_plugin_evsys.engine.model.loading import BaseModel
from nat_plugin_evsys.engine.model.long_rope import rope_types
from nat_plugin_evsys.engine.model.lora import LoraAdapter, applied, random_adapter
from nat_plugin_evsys.engine.model.targets import linear_roles
from nat_plugin_evsys.engine.tree.attention import install
from nat_plugin_evsys.engine.tree.trie import Ids, TokenTrie
from nat_plugin_evsys.errors import one_line

logger = logging.getLogger(__name__)

_TOLERANCE = 1e-4
_TOLERANCE_OF_GRADIENT = 1e-3
"""Deep models amplify: 3.6e-5 for SmolLM2-135M. In bfloat16 that makes any two orders of a sum differ by all of it."""
_WORSE, _SLACK = 1.5, 5e-3
"""How much further off float32 than padded batches the fast path may be: its sums are as long, in another order."""

_COMPILED_ON = ("cuda",)
_COMPILED_ROWS = 160
"""Below 128 rows FlexAttention takes another kernel than a pack's."""


@dataclass(frozen=True)
class _Verdict:
    """Of a base model: why it cannot use the fast path ("" if it can), and whether its layers can be fused."""

    refusal: str
    fuse: bool = True


# The verdict alone: a FastForward holds its base model, which would then stay alive as its own key.
_VERDICTS: WeakKeyDictionary[BaseModel, _Verdict] = WeakKeyDictionary()


def fast_forward(base: BaseModel, head: OutputHead) -> tuple[FastForward | None, str]:
    """``(the fast path, "")``, or ``(None, why this model cannot use it)``; determined once per base model."""
    if base not in _VERDICTS:
        _VERDICTS[base] = _find_out(base, head)
        if _VERDICTS[base].refusal:
            logger.warning("%s trains on padded batches, which is slower: %s", base.name, _VERDICTS[base].refusal)
    verdict = _VERDICTS[base]
    return (None, verdict.refusal) if verdict.refusal else (FastForward(base, head, fuse=verdict.fuse), "")


def _find_out(base: BaseModel, head: OutputHead) -> _Verdict:
    """Leaves trie attention installed in a model that can use the fast path."""
    config = base.model.config.get_text_config()
    if "dynamic" in rope_types(config):
        return _Verdict("its rotary embedding depends on the longest sequence of a batch (dynamic)")
    before = config._attn_implementation
    if not install(base.model):
        return _Verdict(f"its attention is {before!r}, not transformers' SDPA")
    fast = FastForward(base, head)
    reason = _mismatch(base, fast)
    if reason and fast.fused is not None:
        logger.warning("%s trains through transformers' own layers: with fused ones %s", base.name, reason)
        reason = _mismatch(base, FastForward(base, head, fuse=False))
        if not reason:
            return _Verdict("", fuse=False)
    if reason:
        config._attn_implementation_internal = before
    return _Verdict(reason)


def _mismatch(base: BaseModel, fast: FastForward) -> str:
    """What is wrong with the hidden states of a probe, or with their gradient in float32; "" if nothing.

    Where kernels are compiled, in any dtype also whether those of training are, and give finite numbers.
    """
    try:
        if base.device.type in _COMPILED_ON and not _trains(base, fast):
            return f"its hidden states on a token trie of {_COMPILED_ROWS} rows, or their gradient, are not finite"
        if base.dtype != torch.float32:
            with torch.no_grad():
                return _half_mismatch(base, *_states_of_probe(base, fast, None))
        adapter = _adapter_of_probe(base)
        with torch.enable_grad():
            found, plain, _ = _states_of_probe(base, fast, adapter)
            gap = ((plain - found).abs().max() / plain.abs().max()).item()
            if gap > _TOLERANCE:
                return f"its hidden states on a token trie are off by {gap:.1e}, relative to the largest"
            gap = share_of_norm(*(_gradient_of_probe(states, adapter) for states in (found, plain)))
    except Exception as exc:  # noqa: BLE001 - boundary: any model code may run here; the plain path needs none of it
        return f"it fails on a token trie: {one_line(exc)}"
    return "" if gap <= _TOLERANCE_OF_GRADIENT else f"its gradient on a token trie is off by {gap:.1e} of its norm"


def _trains(base: BaseModel, fast: FastForward) -> bool:
    """Whether a training pass over a longer trie, with an adapter, has finite states and gradients."""
    length = min(base.context_length, *(limit or _COMPILED_ROWS for limit in (fast.longest, fast.rope_limit)))
    generator = np.random.default_rng(1)
    tokens = generator.integers(0, base.vocab_size, (-(-_COMPILED_ROWS // length), length))
    trie = TokenTrie.build(list(tokens))
    adapter = _adapter_of_probe(base)
    with torch.enable_grad():
        states = fast.hidden(trie, torch.arange(len(trie)), adapter, keep=False)
        gradient = _gradient_of_probe(states, adapter)
    return bool(states.isfinite().all() and gradient.isfinite().all())


def _gradient_of_probe(states: Tensor, adapter: LoraAdapter) -> Tensor:
    """Of a fixed linear function of the states by all matrices, in one vector."""
    weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(0)).to(states.device)
    leaves = [tensor for _, tensor in adapter.named_tensors()]
    gradient = torch.autograd.grad((states * weights).sum(), leaves, materialize_grads=True)
    return torch.cat([part.flatten() for part in gradient])


def _half_mismatch(base: BaseModel, found: Tensor, plain: Tensor, family: Sequence[Ids]) -> str:
    """What is wrong in a dtype of few bits, where any two orders of a sum differ: compare both with float32.

    By the norm of all states, which a few wrong rows move, and by the median row, which a flipped expert does not.
    """
    with torch.no_grad(), applied(None):
        exact = hidden_rows(float32_twin(base.model), [torch.from_numpy(s) for s in family], base.device)
    (fast_norm, fast_median), (norm, median) = (_errors(states.float(), exact) for states in (found, plain))
    if fast_norm <= _WORSE * norm + _SLACK and fast_median <= _WORSE * median + _SLACK:
        return ""
    return (
        f"its hidden states on a token trie are {fast_norm:.1e} off those of float32 (median row {fast_median:.1e}), "
        f"and those of padded batches {norm:.1e} ({median:.1e})"
    )


def _errors(states: Tensor, exact: Tensor) -> tuple[float, float]:
    """Distance as a share of the norm: of all rows together, and of the median row."""
    by_row = (states - exact).norm(dim=-1) / exact.norm(dim=-1)
    return share_of_norm(states, exact), float(by_row.median())


def _states_of_probe(
    base: BaseModel, fast: FastForward, adapter: LoraAdapter | None
) -> tuple[Tensor, Tensor, list[Ids]]:
    """Hidden states over a trie with branches, those of padded batches, and the sequences."""
    generator = np.random.default_rng(0)
    trunk = generator.integers(0, base.vocab_size, 7)
    tails = [generator.integers(0, base.vocab_size, n) for n in (3, 3, 5)]
    family: list[Ids] = [np.concatenate([trunk[:k], t]) for k, t in zip((7, 7, 4), tails, strict=True)]
    window = min(fast.longest or 10, fast.rope_limit or 10)
    family = [s[:window] for s in (*family, generator.integers(0, base.vocab_size, 6))]
    trie = TokenTrie.build(family)
    with applied(adapter, fused=False):
        plain = hidden_rows(base.model, [torch.from_numpy(s) for s in family], base.device)
    # Layers that are not fused are computed again, which is then compared as well.
    found = fast.hidden(trie, torch.arange(len(trie)), adapter, keep=fast.fused is not None)
    return found[torch.from_numpy(np.concatenate(trie.rows)).to(base.device)], plain, family


def _adapter_of_probe(base: BaseModel) -> LoraAdapter:
    """On every second layer, so that both kinds are seen; it takes a gradient.

    Compared in float32 only: elsewhere no layer is fused, so the same modules add the adapter on both paths.
    """
    names = [name for name, role in linear_roles(base.model).items() if role != "unembed"]
    adapter = random_adapter(base.model, names[::2])
    for _, tensor in adapter.named_tensors():
        tensor.requires_grad_()
    return adapter
