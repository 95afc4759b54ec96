"""Base models in memory: each is loaded once and shared by all adapters over it."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol

import torch

from nat_plugin_evsys.engine.checkpoint_loading import check_base, load_checkpoint, start_from
from nat_plugin_evsys.engine.checkpoints import CheckpointInfo
from nat_plugin_evsys.engine.gradient.steps import LocalSteps, Steps
from nat_plugin_evsys.engine.gradient.trainable import TrainableModel
from nat_plugin_evsys.engine.machine.fixed_order import compute_in_fixed_order
from nat_plugin_evsys.engine.model.loading import BaseModel, load_base_model
from nat_plugin_evsys.engine.model.lora import LoraAdapter, applied
from nat_plugin_evsys.engine.model.source import local_key
from nat_plugin_evsys.engine.model.targets import linear_roles
from nat_plugin_evsys.engine.sampler import Sampler
from nat_plugin_evsys.engine.sampling.client import LocalSamplingClient
from nat_plugin_evsys.engine.sampling.grammars import Grammars
from nat_plugin_evsys.errors import CheckpointError, EngineClosedError
from nat_plugin_evsys.runtime import defaults

BASE_POLICY_VERSION = -1
"""The policy version of a base model without an adapter."""


class AnySampler(Protocol):
    """What is needed of a ``Sampler``, wherever it samples."""

    grammars: Grammars | None

    def client(self, adapter: LoraAdapter | None, policy_version: int) -> LocalSamplingClient:
        """See ``Sampler.client``."""
        ...

    def rest(self, client: LocalSamplingClient) -> None:
        """See ``Sampler.rest``."""
        ...

    def close(self) -> None:
        """See ``Sampler.close``."""
        ...


class SharedBase:
    """A base model and the sampler that all its adapters share, created on first use.

    Args:
        max_batch_size: see ``Sampler``.
        deterministic: every sequence is decoded alone, from its first token on, and steps are cut in one way, so that
            no result depends on what else is going on or on how much memory is free.
    """

    def __init__(
        self, base: BaseModel, max_batch_size: int = defaults.MAX_BATCH_SIZE, *, deterministic: bool = False
    ) -> None:
        self.base = base
        self._max_batch_size = max_batch_size
        self._deterministic = deterministic
        self._lock = threading.Lock()
        self._sampler: AnySampler | None = None
        self._closed = False

    @property
    def sampler(self) -> AnySampler:
        """The sampler.

        Raises:
            EngineClosedError: the base has been closed.
        """
        with self._lock:
            if self._closed:
                raise EngineClosedError("the engine has been closed; create a new one")
            if self._sampler is None:
                self._sampler = self._new_sampler()
            return self._sampler

    def rest(self, client: LocalSamplingClient) -> None:
        """A training step is about to replace what ``client`` samples from; see ``Sampler.rest``."""
        with self._lock:
            sampler = self._sampler
        if sampler is not None:
            sampler.rest(client)

    def _new_sampler(self) -> AnySampler:
        if self._deterministic:
            return Sampler(self.base, max_batch_size=1, prefix_cache_bytes=0, path="plain")
        return Sampler(self.base, max_batch_size=self._max_batch_size)

    def fresh(
        self,
        *,
        rank: int = defaults.RANK,
        alpha: float = defaults.ALPHA,
        seed: int | None = None,
        train_attn: bool = defaults.TRAIN_ATTN,
        train_mlp: bool = defaults.TRAIN_MLP,
        train_unembed: bool = defaults.TRAIN_UNEMBED,
        untrained_logprobs: bool = True,
    ) -> TrainableModel:
        """A fresh adapter, ready for training; see ``LoraAdapter.create`` and ``train``."""
        flags = {"train_attn": train_attn, "train_mlp": train_mlp, "train_unembed": train_unembed}
        adapter = LoraAdapter.create(self.base.model, rank=rank, alpha=alpha, seed=seed, **flags)
        return self.train(adapter, untrained_logprobs=untrained_logprobs)

    def train(self, adapter: LoraAdapter, *, untrained_logprobs: bool = True) -> TrainableModel:
        """``adapter`` made ready for training. One at a time: the first one prepares the base model.

        ``untrained_logprobs``: see ``TrainableModel``.
        """
        budget = defaults.DETERMINISTIC_TOKENS if self._deterministic else None
        with self._lock:
            return TrainableModel(
                self.base,
                adapter,
                token_budget=budget,
                untrained_logprobs=untrained_logprobs,
                steps=self._steps(adapter),
            )

    def _steps(self, adapter: LoraAdapter) -> Steps:
        """What computes the passes of an adapter."""
        return LocalSteps(self.base, adapter)

    def train_checkpoint(self, info: CheckpointInfo, *, with_optimizer: bool) -> TrainableModel:
        """A model of a checkpoint's LoRA shape and weights, with its moments if asked for.

        Raises:
            CheckpointError: torn, made for another base model, or without the optimizer asked for.
        """
        check_base(info, self.base)
        if info.is_foreign and with_optimizer:
            raise CheckpointError(f"checkpoint {info.path} is of another program and has no optimizer state to load")
        roles = linear_roles(self.base.model)
        if not set(info.targets) <= set(roles):
            raise CheckpointError(f"checkpoint {info.path} adapts modules that {self.base.name} does not have")
        trained = {f"train_{role}": role in {roles[target] for target in info.targets} for role in roles.values()}
        flags = {"train_attn": False, "train_mlp": False, "train_unembed": False, **trained}
        model = self.train(LoraAdapter.create(self.base.model, rank=info.rank, alpha=info.alpha, **flags))
        if with_optimizer:
            load_checkpoint(info.path, model, with_optimizer=True)
        else:
            start_from(info.path, model)
        return model

    def is_healthy(self) -> bool:
        """True when a one-token forward pass of the bare base model gives finite logits."""
        ids = torch.zeros(1, 1, dtype=torch.int64, device=self.base.device)
        try:
            with torch.no_grad(), applied(None):
                logits = self.base.model(input_ids=ids, use_cache=False).logits
        except RuntimeError:
            # A broken device (lost GPU, out of memory) is exactly what this reports.
            return False
        return bool(torch.isfinite(logits).all())

    def close(self) -> None:
        """Fail what is being sampled and free the sampler's memory."""
        with self._lock:
            self._closed = True
            sampler, self._sampler = self._sampler, None
        if sampler is not None:
            sampler.close()


def open_here(
    base_model: str, *, max_batch_size: int = defaults.MAX_BATCH_SIZE, deterministic: bool = False, **options: Any
) -> SharedBase:
    """Load a base model into this process.

    Args:
        max_batch_size: see ``Sampler``.
        deterministic: see ``SharedBase``; the process then computes on one thread (``compute_in_fixed_order``).
        options: of ``load_base_model``.

    Raises:
        ModelError: it cannot be loaded.
    """
    if deterministic:
        compute_in_fixed_order()
    return SharedBase(load_base_model(base_model, **options), max_batch_size, deterministic=deterministic)


class BaseModels:
    """Loads base models on demand. Safe to use from several threads.

    Args:
        open_base: ``open_here``, or what opens a base elsewhere.
        options: of ``open_base``.
    """

    def __init__(self, open_base: Callable[..., SharedBase] = open_here, **options: Any) -> None:
        self._open = open_base
        self._options = options
        self._lock = threading.Lock()
        self._loading: dict[str, threading.Lock] = {}
        self._loaded: dict[str, SharedBase] = {}
        self._closed = False

    def get(self, base_model: str) -> SharedBase:
        """The model of that name, loaded if necessary. A loaded model does not wait while another one loads.

        Raises:
            ModelError: it cannot be loaded. The next call tries again.
            EngineClosedError: the service has been closed.
        """
        key = local_key(base_model)
        with self._lock:
            loading = self._loading.setdefault(key, threading.Lock())
        with loading:
            self._check_open()
            if key not in self._loaded:
                shared = self._open(base_model, **self._options)
                with self._lock:
                    self._check_open()
                    self._loaded[key] = shared
            return self._loaded[key]

    def loaded(self) -> list[BaseModel]:
        """The models in memory, in the order they were loaded."""
        with self._lock:
            return [shared.base for shared in self._loaded.values()]

    def close(self) -> None:
        """Close the samplers and release the models."""
        with self._lock:
            self._closed = True
            shared, self._loaded = list(self._loaded.values()), {}
        for each in shared:
            each.close()

    def _check_open(self) -> None:
        if self._closed:
            raise EngineClosedError("the ServiceClient has been closed; create a new one")


class BasesInUse:
    """The bases that this process's backends train on: what asks for the same one shares it until its last user leaves.

    Safe to use from several threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._shared: dict[Any, SharedBase] = {}
        self._users: Counter[int] = Counter()

    def take(self, base_model: str, open_base: Callable[..., SharedBase] = open_here, **options: Any) -> SharedBase:
        """The base of these settings, loaded unless it is in use. Give it back with ``leave``.

        Args:
            open_base: ``open_here``, or what opens a base elsewhere.
            options: of ``open_base``.

        Raises:
            ModelError: it cannot be loaded. The next call tries again.
        """
        key = (local_key(base_model), open_base, *sorted(options.items()))
        with self._lock:
            if key not in self._shared:
                self._shared[key] = open_base(base_model, **options)
            shared = self._shared[key]
            self._users[id(shared)] += 1
            return shared

    def leave(self, shared: SharedBase) -> None:
        """Close a base that ``take`` gave, unless others that took it still use it."""
        with self._lock:
            self._users[id(shared)] -= 1
            if self._users[id(shared)] > 0:
                return
            del self._users[id(shared)]
            self._shared = {key: other for key, other in self._shared.items() if other is not shared}
        shared.close()


BASES_IN_USE = BasesInUse()
"""Those of this process: two policies on one base are one model in memory."""
