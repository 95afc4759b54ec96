"""Policies that decode at the same time do so in one pass over the model, each with its own adapter."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from nat_plugin_evsys.engine.sampling.decode_batch import DecodeBatch
from nat_plugin_evsys.engine.sampling.policies import SamplingPolicy
from nat_plugin_evsys.engine.sampling.row_decoder import Context
from nat_plugin_evsys.engine.spans.attention import Level, Piece, SpanPlan
from nat_plugin_evsys.engine.spans.decoder import SpanDecoder
from nat_plugin_evsys.engine.spans.mixed import MixedAdapters
from nat_plugin_evsys.engine.spans.rollout_model import RolloutModel
from nat_plugin_evsys.errors import one_line
from nat_plugin_evsys.garbage import empty_frames

logger = logging.getLogger(__name__)


class JointDecoding:
    """Steps of several ``SpanDecoder`` of one model.

    The weights of the base model are packed once for all of them, whatever their number; each alone has a merged copy.
    A policy that has begun to decode jointly goes on so until it has nothing to do. The adapters of the last joint step
    stay side by side for the next, if they take no more memory than the base model's weights, until they are forgotten.
    A model that does not mix policies decodes each alone, and so does one whose joint pass fails.
    """

    def __init__(self, model: RolloutModel) -> None:
        self._model = model
        self._mixed = MixedAdapters()
        self._begun = False
        self._fit: dict[int, bool] = {}
        self._able = model.mixes

    def chosen(self, batches: Sequence[DecodeBatch]) -> list[DecodeBatch]:
        """Those that decode in one pass from now on; none where only one could, unless it has done so before."""
        least = 1 if self._begun else 2
        if len(batches) < least:
            return []
        found = [batch for batch in batches if isinstance(batch.decoder, SpanDecoder) and self.takes(batch.policy)]
        return found if len(found) >= least else []

    def takes(self, policy: SamplingPolicy) -> bool:
        """Whether a policy can be part of a joint step: its adapter is of layers that can be mixed."""
        adapter = policy.adapter
        if not self._able or adapter is None:
            return self._able
        if policy.ident not in self._fit:
            self._fit[policy.ident] = set(adapter.weights) <= self._model.versions.names
        return self._fit[policy.ident]

    def decode(self, batches: Sequence[DecodeBatch]) -> None:
        """``DecodeBatch.step`` of each, with one pass for all of them."""
        begun = [(batch, batch.begin()) for batch in batches]
        ready = [(batch, tokens) for batch, tokens in begun if tokens is not None]
        if not ready:
            return
        decoders = [batch.decoder for batch, _ in ready]
        try:
            found = self.step([each for each in decoders if isinstance(each, SpanDecoder)], [last for _, last in ready])
        except Exception as exc:  # noqa: BLE001 - boundary: any model code may run here; alone, each fails by itself
            logger.warning("policies are sampled one after the other: their joint pass fails: %s", one_line(exc))
            empty_frames(exc)  # before the passes that follow
            self._able = False
            self.end()
            for batch in batches:
                if isinstance(batch.decoder, SpanDecoder):
                    batch.decoder.part()
            for batch, tokens in ready:
                batch.decode(tokens)
            return
        for (batch, _), enter in zip(ready, found, strict=True):
            batch.end(enter)

    def step(
        self, decoders: Sequence[SpanDecoder], tokens: Sequence[Sequence[int]]
    ) -> list[Callable[[], tuple[Tensor, list[Context]]]]:
        """One pass for all, and for each decoder a call that gives what its ``SpanDecoder.step`` does.

        If the pass fails, nothing has changed that another one would not set again.
        """
        room = max(1, min(decoder.pass_tokens for decoder in decoders) // len(decoders))
        planned = {each.policy: each.plan(last, room) for each, last in zip(decoders, tokens, strict=True)}
        self._begun = True
        slots = self._mixed.hold({each.policy: each.adapter for each in decoders if each.adapter is not None})
        order = slots + [each.policy for each in decoders if each.adapter is None]
        passes = [planned[ident] for ident in order]
        starts = [0, *accumulate(len(each.ids) for each in passes)][:-1]
        plan = joined([each.plan for each in passes])
        tokens_of = {s: start + i for each, start in zip(passes, starts, strict=True) for i, s in enumerate(each.slots)}
        plan.own = decoders[0].slots.own_tokens(tokens_of)
        logits = self._model.mixed_logits(
            self._mixed,
            torch.cat([each.ids for each in passes]),
            torch.cat([each.positions for each in passes]),
            plan,
            [each.at + start for each, start in zip(passes, starts, strict=True)],
            [len(each.ids) for each in passes],
        )
        found = dict(zip(order, logits, strict=True))
        for each in decoders:
            each.advance(planned[each.policy])
        return [partial(each.enter, planned[each.policy], found[each.policy]) for each in decoders]

    def end(self) -> None:
        """No policy decodes jointly now."""
        self._begun = False
        if self._mixed.nbytes > self._model.versions.base_bytes:
            self._mixed.clear()
        self._model.versions.done_sharing()

    def forget(self, policy: int) -> None:
        """Free what is kept of a policy; if it is still decoded, the next step makes that again."""
        self._fit.pop(policy, None)
        self._mixed.drop(policy)
        self._model.versions.forget(policy)

    def clear(self) -> None:
        """Free everything."""
        self._mixed.clear()
        self._model.versions.clear()


def joined(plans: Sequence[SpanPlan]) -> SpanPlan:
    """The plan of all tokens, one plan's after another's; none sees another's. Without the rows' own tokens."""
    whole = SpanPlan(sum(plan.tokens for plan in plans))
    start = 0
    for plan in plans:
        whole.pieces += [Piece(p.start + start, p.stop + start, p.kv, p.at) for p in plan.pieces]
        whole.levels += [Level(_moved(level.order, start), level.reads) for level in plan.levels]
        start += plan.tokens
    return whole


def _moved(order: slice | Tensor, start: int) -> slice | Tensor:
    return order + start if isinstance(order, Tensor) else slice(order.start + start, order.stop + start)
