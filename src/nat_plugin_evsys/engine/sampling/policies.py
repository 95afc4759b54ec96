"""Policies of a sampler, from the first client of each until the last one is gone."""

from __future__ import annotations

import weakref
from collections import deque
from dataclasses import dataclass
from functools import cached_property
from itertools import count

from nat_plugin_evsys.engine.model.lora import LoraAdapter
from nat_plugin_evsys.errors import ModelError


@dataclass(frozen=True, eq=False)
class SamplingPolicy:
    """Frozen weights to sample from: ``ident`` is unique in a sampler, ``version`` is what results report."""

    ident: int
    version: int
    adapter: LoraAdapter | None

    @cached_property
    def is_finite(self) -> bool:
        """Whether no weight of its adapter is NaN or infinite; read once."""
        return self.adapter is None or all(bool(tensor.isfinite().all()) for _, tensor in self.adapter.named_tensors())

    def not_finite(self) -> ModelError:
        """Why it cannot be sampled from if its weights, or its logits, are not finite."""
        return ModelError(
            f"policy version {self.version} gives logits that are not finite; its weights are broken: "
            "use an earlier checkpoint, or lower the learning rate"
        )


class Policies:
    """Makes policies, and says which of them nobody can sample from any more."""

    def __init__(self) -> None:
        self._idents = count()
        self._bare: dict[int, int] = {}
        self._gone: deque[int] = deque()

    def new(self, adapter: LoraAdapter | None, version: int) -> SamplingPolicy:
        """A policy. A trainable adapter is copied; a version of the bare base model, None, is the same each time."""
        if adapter is None:
            return SamplingPolicy(self._bare.setdefault(version, next(self._idents)), version, None)
        if any(tensor.requires_grad for _, tensor in adapter.named_tensors()):
            adapter = adapter.snapshot()
        policy = SamplingPolicy(next(self._idents), version, adapter)
        weakref.finalize(policy, self._gone.append, policy.ident).atexit = False
        return policy

    def gone(self) -> list[int]:
        """Idents of policies with an adapter that were given up since the last call."""
        return [self._gone.popleft() for _ in range(len(self._gone))]
