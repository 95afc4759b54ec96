"""Decides whether a base model can use the sampler's fast path, by comparing it once with a plain forward pass."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from nat_plugin_evsys.engine.model.loading import BaseModel
from nat_plugin_evsys.engine.model.long_rope import long_rope_limit, rope_types
from nat_plugin_evsys.engine.model.lora import applied
from nat_plugin_evsys.engine.sampling.decoding_check import decoding_gap
from nat_plugin_evsys.engine.sampling.kv_cache import KVLayout
from nat_plugin_evsys.engine.spans.attention import Level, Piece, Read, SpanPlan
from nat_plugin_evsys.engine.spans.decoder import SpanDecoder
from nat_plugin_evsys.engine.spans.packed_linear import PackedVersions
from nat_plugin_evsys.engine.spans.rollout_model import RolloutModel
from nat_plugin_evsys.engine.spans.slots import RowSlots
from nat_plugin_evsys.engine.spans.tree import SpanTree
from nat_plugin_evsys.errors import one_line

logger = logging.getLogger(__name__)

_ABOVE, _BELOW = 9, 4
_TOLERANCE = 1e-4
_PASS_TOKENS = 8
"""Fewer than the check's longest context: it is read in pieces."""


def rollout_model(base: BaseModel, layout: KVLayout) -> tuple[RolloutModel | None, str]:
    """``(the model, "")``, or ``(None, why it cannot use the fast path)``, which is also logged."""
    reason = _unfit(base, layout)
    if not reason:
        try:
            model = RolloutModel(base)
            gap = max(_gap(base, model, layout), _gap_of_decoder(base, model, layout))
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


def _gap(base: BaseModel, model: RolloutModel, layout: KVLayout) -> float:
    """Largest difference of logits, relative to the largest logit, over two sequences with a common prefix."""
    generator = torch.Generator().manual_seed(0)
    above, *below = (torch.randint(base.vocab_size, (n,), generator=generator) for n in (_ABOVE, _BELOW, _BELOW))
    with torch.inference_mode():
        with applied(None):
            plain = [base.model(input_ids=torch.cat([above, b])[None], use_cache=False).logits[0] for b in below]
        found = _over_spans(model, layout, above, below)
    expected = torch.cat([plain[0][:_ABOVE], plain[0][_ABOVE:], plain[1][_ABOVE:]]).float()
    return float((found - expected).abs().max() / expected.abs().max())


def _gap_of_decoder(base: BaseModel, model: RolloutModel, layout: KVLayout) -> float:
    """``decoding_gap`` without reordered weights, which take longer to make than the check."""
    versions, model.versions = model.versions, PackedVersions([], base.dtype)
    tree, slots = SpanTree(layout, 0), RowSlots(layout)
    try:
        decoder = SpanDecoder(model, tree, 0, None, pass_tokens=_PASS_TOKENS, kv_bytes=1 << 40, slots=slots)
        return decoding_gap(decoder, base)
    finally:
        model.versions, model.fed_tokens = versions, 0


def _over_spans(model: RolloutModel, layout: KVLayout, above: Tensor, below: list[Tensor]) -> Tensor:
    heads, dim = layout.widest
    kv = [torch.empty(len(layout.layers), 2, heads, n, dim) for n in (_ABOVE, _BELOW, _BELOW)]
    ids = torch.cat([above, *below])
    positions = torch.cat([torch.arange(_ABOVE), *[torch.arange(_ABOVE, _ABOVE + _BELOW)] * 2])
    borders = [0, _ABOVE, _ABOVE + _BELOW, len(ids)]
    pieces = [Piece(borders[i], borders[i + 1], kv[i], 0) for i in range(3)]
    level = Level(slice(_ABOVE, len(ids)), [Read(0, 2 * _BELOW, kv[0], _ABOVE)])
    plan = SpanPlan(len(ids), [], pieces, [level])
    return model.logits(None, ids, positions, plan, torch.arange(len(ids)))
