"""Decides whether a base model can use the sampler's fast path, by comparing it once with a plain forward pass."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from nat_plugin_evsys.engine.model.loading import BaseModel
from nat_plugin_evsys.engine.model.long_rope import long_rope_limit, rope_types
from nat_plugin_evsys.engine.model.lora import LoraAdapter, applied, random_adapter
from nat_plugin_evsys.engine.sampling.budgets import KVBudget
from nat_plugin_evsys.engine.sampling.decoding_check import decoding_gap
from nat_plugin_evsys.engine.sampling.kv_cache import KVLayout
from nat_plugin_evsys.engine.spans.attention import Level, Piece, Read, SpanPlan
from nat_plugin_evsys.engine.spans.decoder import SpanDecoder
from nat_plugin_evsys.engine.spans.mixed import MixedAdapters
from nat_plugin_evsys.engine.spans.rollout_model import RolloutModel
from nat_plugin_evsys.engine.spans.slots import RowSlots
from nat_plugin_evsys.engine.spans.tree import SpanTree
from nat_plugin_evsys.errors import one_line

logger = logging.getLogger(__name__)

_ABOVE, _BELOW = 9, 4
_OWN = 4, 3
_TOLERANCE = 1e-4
_PASS_TOKENS = 8
"""Fewer than the check's longest context: it is read in pieces."""


def rollout_model(base: BaseModel, layout: KVLayout) -> tuple[RolloutModel | None, str]:
    """``(the model, "")``, or ``(None, why it cannot use the fast path)``, which is also logged."""
    reason = _unfit(base, layout)
    if not reason:
        try:
            model = RolloutModel(base)
            gap = max(_gap_of_passes(base, model, layout), _gap_of_decoder(base, model, layout))
        except Exception as exc:  # noqa: BLE001 - boundary: any model code may run here; the plain path needs none of it
            reason = f"it fails on spans: {one_line(exc)}"
        else:
            if gap <= _TOLERANCE:
                return model, ""
            reason = f"its logits on spans are off by {gap:.1e}, relative to the largest"
    if base.device.type == "cpu":
        logger.warning("%s is sampled with the plain, slower decoder: %s", base.name, reason)
    return None, reason


def _unfit(base: BaseModel, layout: KVLayout) -> str:
    config = base.model.config.get_text_config()
    if base.device.type != "cpu" or base.dtype != torch.float32:
        return f"the fast path is for fp32 on a CPU, and this is {base.dtype} on {base.device}"
    if len(set(layout.layers)) > 1 or layout.layers[0][1] != layout.layers[0][2]:
        return "its layers keep keys and values of different shapes"
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or (["sliding_attention"] if window else [])
    if "sliding_attention" in kinds and (window or 0) < base.context_length:
        return f"it has layers that attend to {window} tokens only, and its context is {base.context_length}"
    if "dynamic" in rope_types(config):
        return "its rotary embedding depends on the longest sequence of a batch"
    limit = long_rope_limit(base.model)
    if limit is not None and limit < base.context_length:
        return f"its rotary embedding changes at {limit} tokens, and its context is {base.context_length}"
    if not base.model._can_set_attn_implementation():
        return "its attention cannot be chosen"
    return ""


def _gap_of_passes(base: BaseModel, model: RolloutModel, layout: KVLayout) -> float:
    """``_gap`` with two adapters, which then ``model.mixes``; without any where that fails, or is known to.

    Experts get the rows in an order of their own.
    """
    if any("expert" in name for name in model.versions.names):
        return _gap(base, model, layout, [])
    names = sorted(model.versions.names)
    adapters = [random_adapter(base.model, names[::step], rank=1 + step, seed=step) for step in (1, 2)]
    try:
        gap = _gap(base, model, layout, adapters)
    except Exception as exc:  # noqa: BLE001 - boundary: any model code may run here; alone, policies need none of it
        reason = f"it fails: {one_line(exc)}"
    else:
        if gap <= _TOLERANCE:
            model.mixes = True
            return gap
        reason = f"its logits are off by {gap:.1e}, relative to the largest"
    gap = _gap(base, model, layout, [])
    if gap <= _TOLERANCE:
        logger.warning("%s: policies are sampled one after the other, not in one pass: %s", base.name, reason)
    return gap


def _gap(base: BaseModel, model: RolloutModel, layout: KVLayout, adapters: Sequence[LoraAdapter]) -> float:
    """Largest difference of logits, relative to the largest logit, over two sequences with a common prefix, and in the
    same pass over the last token of one sequence of each of ``adapters``."""
    generator = torch.Generator().manual_seed(0)
    above, *below = (torch.randint(base.vocab_size, (n,), generator=generator) for n in (_ABOVE, _BELOW, _BELOW))
    own = [torch.randint(base.vocab_size, (n,), generator=generator) for n in _OWN[: len(adapters)]]
    with torch.inference_mode():
        expected = [_plain(base, adapter, ids)[-1:] for adapter, ids in zip(adapters, own, strict=True)]
        first, second = (_plain(base, None, torch.cat([above, each])) for each in below)
        found = _over_spans(model, layout, adapters, own, above, below)
    expected.append(torch.cat([first, second[_ABOVE:]]))
    return max(_largest(a - b, b) for a, b in zip(found, expected, strict=True))


def _largest(difference: Tensor, logits: Tensor) -> float:
    """Relative to the largest logit; infinite where one is not finite, which ``max`` would pass over."""
    gap = float(difference.abs().max() / logits.abs().max())
    return gap if gap == gap else float("inf")


def _plain(base: BaseModel, adapter: LoraAdapter | None, ids: Tensor) -> Tensor:
    """Logits [T, V]."""
    with applied(adapter, fused=False):
        logits: Tensor = base.model(input_ids=ids[None], use_cache=False).logits[0]
    return logits.float()


def _gap_of_decoder(base: BaseModel, model: RolloutModel, layout: KVLayout) -> float:
    """``decoding_gap`` without reordered weights, which take longer to make than the check."""
    tree, slots = SpanTree(layout, 0), RowSlots(layout)
    with model.versions.unpacked():
        decoder = SpanDecoder(model, tree, 0, None, pass_tokens=_PASS_TOKENS, kv=KVBudget(1 << 40), slots=slots)
        gap = decoding_gap(decoder, base)
    model.fed_tokens = 0
    return gap


def _over_spans(
    model: RolloutModel,
    layout: KVLayout,
    adapters: Sequence[LoraAdapter],
    own: Sequence[Tensor],
    above: Tensor,
    below: Sequence[Tensor],
) -> list[Tensor]:
    """Logits at the last token of each of ``own``, and at all of ``above`` and ``below``."""
    mixed, parts = MixedAdapters(), [*own, above, *below]
    mixed.hold(dict(enumerate(adapters)))
    ends = list(accumulate(len(each) for each in parts))
    heads, dim = layout.widest
    kv = [torch.empty(len(layout.layers), 2, heads, len(each), dim) for each in parts]
    pieces = [Piece(end - len(ids), end, to, 0) for end, ids, to in zip(ends, parts, kv, strict=True)]
    level = Level(slice(ends[-3], ends[-1]), [Read(0, 2 * _BELOW, kv[-3], _ABOVE)])
    starts = [0] * (len(own) + 1) + [_ABOVE, _ABOVE]
    positions = torch.cat([torch.arange(at, at + len(ids)) for at, ids in zip(starts, parts, strict=True)])
    counts = [*(len(ids) for ids in own), _ABOVE + 2 * _BELOW]
    *of_own, of_bare = torch.arange(ends[-1]).split(counts)
    rows = [*(each[-1:] for each in of_own), of_bare]
    with model.versions.unpacked():
        return model.mixed_logits(
            mixed, torch.cat(parts), positions, SpanPlan(ends[-1], [], pieces, [level]), rows, counts
        )
