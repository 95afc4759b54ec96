"""The base model as the sampler runs it on a CPU: the same weights in a copy of the modules, optimised for few rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nat_plugin_evsys.engine.model.forward import OutputHead
from nat_plugin_evsys.engine.model.loading import BaseModel
from nat_plugin_evsys.engine.model.lora import LoraAdapter, applied
from nat_plugin_evsys.engine.model.plain_copy import copy_of_modules
from nat_plugin_evsys.engine.model.targets import text_decoder
from nat_plugin_evsys.engine.spans.attention import SpanPlan, attending, install
from nat_plugin_evsys.engine.spans.mixed import MixedAdapters
from nat_plugin_evsys.engine.spans.packed_linear import PackedVersions, replace_linears


class RolloutModel:
    """Passes of a base model over packed tokens, with any policy version.

    Its modules are copies that share their tensors with the base model's, so that what is done to them, an attention
    along a ``SpanPlan`` and other linear layers, does not reach the trainer.

    Attributes:
        versions: the weights of each policy version.
        mixes: whether several policies may be in one pass; set once that has been compared with each alone.
        fed_tokens: tokens that decoders have fed so far.

    Raises:
        ModelError: the model changes its logits after the output head in an unknown way.
    """

    def __init__(self, base: BaseModel) -> None:
        model = copy_of_modules(base.model)
        self.versions = PackedVersions(replace_linears(model), base.dtype)
        self._head = OutputHead(model)
        self._decoder = text_decoder(model)
        self.mixes = False
        self.fed_tokens = 0
        install(model)

    def logits(
        self, adapter: LoraAdapter | None, ids: Tensor, positions: Tensor, plan: SpanPlan, rows: Tensor
    ) -> Tensor:
        """Logits [len(rows), V] at tokens ``rows`` of a pass over ``ids`` at ``positions``, [T] each.

        Layers whose ``versions`` are in use have ``adapter`` in their weights; the others add it.
        """
        with applied(adapter), attending(plan):
            out = self._decoder(input_ids=ids[None], position_ids=positions[None], use_cache=False)
            return self._head(out.last_hidden_state[0, rows])

    def mixed_logits(
        self,
        mixed: MixedAdapters,
        ids: Tensor,
        positions: Tensor,
        plan: SpanPlan,
        rows: Sequence[Tensor],
        counts: Sequence[int],
    ) -> list[Tensor]:
        """``logits`` at the ``rows`` of each adapter. One after another, they have ``counts`` of the tokens."""
        self.versions.share(mixed)
        with applied(None), attending(plan):
            mixed.set_rows(counts)
            out = self._decoder(input_ids=ids[None], position_ids=positions[None], use_cache=False)
            wanted = [len(each) for each in rows]
            mixed.set_rows(wanted)
            logits = self._head(out.last_hidden_state[0, torch.cat([*rows])])
        return list(logits.split(wanted))
