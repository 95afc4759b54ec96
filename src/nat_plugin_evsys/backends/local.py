"""The engine in this process as a ``Backend``: one model and its queue, over a base that others may share."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np

from nat_plugin_evsys.backends.base import Architecture, LossCallable, SamplingClient
from nat_plugin_evsys.engine.checkpoint_loading import load_adapter, load_checkpoint, start_from
from nat_plugin_evsys.engine.checkpoints import (
    Kind,
    checkpoint_path,
    delete_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from nat_plugin_evsys.engine.gradient.custom_loss import checked_loss
from nat_plugin_evsys.engine.gradient.operations import OperationFuture
from nat_plugin_evsys.engine.gradient.queue import TrainingQueue
from nat_plugin_evsys.engine.gradient.trainable import Progress, TrainableModel
from nat_plugin_evsys.engine.machine.allocator import keep_memory
from nat_plugin_evsys.engine.model.images import ReadsImages, reader_or_reason
from nat_plugin_evsys.engine.model.loading import BaseModel, resolve_device
from nat_plugin_evsys.engine.model.lora import LoraAdapter
from nat_plugin_evsys.engine.sampling.client import LocalSamplingClient
from nat_plugin_evsys.errors import CheckpointError
from nat_plugin_evsys.runtime import defaults
from nat_plugin_evsys.runtime.bases import BASES_IN_USE, SharedBase
from nat_plugin_evsys.runtime.checkpoint_store import SEGMENTS

if TYPE_CHECKING:
    import tinker
    from tinker import types

    from nat_plugin_evsys.backends.vllm.rollouts import VllmRollouts

T = TypeVar("T")

SAMPLER_WEIGHTS = SEGMENTS["sampler"]
"""Directory of ``save_for_sampler`` below ``checkpoint_dir``; ``save_full_state`` writes beside it."""


class LocalBackend:
    """A LoRA adapter over a base model in this process.

    Operations run in submission order in the backend's own thread; the event loop is never blocked. A failed
    operation fails its own awaitable and does not affect later ones. A policy version is the number of optimizer steps
    that made the weights.

    Attributes:
        base: the base model.
        checkpoint_dir: where ``save_for_sampler`` and ``save_full_state`` write; may be set at any time.
        policy_version: of the latest snapshot, -1 before the first.
        rollouts: the vLLM server that samples policy versions; None: this process does. Closed with the backend.
    """

    def __init__(
        self,
        base: BaseModel | SharedBase,
        adapter: LoraAdapter,
        *,
        checkpoint_dir: Path,
        max_batch_size: int = defaults.MAX_BATCH_SIZE,
        untrained_logprobs: bool = True,
        deterministic: bool = False,
    ) -> None:
        """A ``SharedBase`` has a ``max_batch_size`` and is ``deterministic`` or not by itself. Its owner closes it.

        ``untrained_logprobs``: see ``TrainableModel``; ``deterministic``: see ``SharedBase``.
        """
        self._release: Callable[[], None] = lambda: None
        if isinstance(base, BaseModel):
            base = SharedBase(base, max_batch_size, deterministic=deterministic)
            self._release = base.close
        self.base = base.base
        self.checkpoint_dir = Path(checkpoint_dir)
        self.policy_version = -1
        self._shared = base
        self._model = self._shared.train(adapter, untrained_logprobs=untrained_logprobs)
        self._queue = TrainingQueue(self._model)
        self.rollouts: VllmRollouts | None = None
        self._newest: weakref.ref[LocalSamplingClient] | None = None

    @classmethod
    async def create(
        cls,
        base_model: str,
        *,
        rank: int = defaults.RANK,
        alpha: float = defaults.ALPHA,
        seed: int | None = 0,
        train_attn: bool = defaults.TRAIN_ATTN,
        train_mlp: bool = defaults.TRAIN_MLP,
        train_unembed: bool = defaults.TRAIN_UNEMBED,
        checkpoint_dir: Path,
        device: str = defaults.DEVICE,
        dtype: str = defaults.DTYPE,
        quantization: str = defaults.QUANTIZATION,
        context_length: int | None = None,
        max_batch_size: int = defaults.MAX_BATCH_SIZE,
        trust_remote_code: bool = False,
        cache_dir: Path | None = None,
        untrained_logprobs: bool = True,
        deterministic: bool = False,
    ) -> LocalBackend:
        """Put a fresh adapter on the base model, which is loaded unless another backend of this process has it.

        To start from a checkpoint, ``load_state`` it next.

        Args:
            deterministic: the same operations give the same bits in every process; the process then computes on one
                thread.

        Raises:
            ModelError: the model cannot be loaded or lacks a selected LoRA target.
            ConfigError: unknown device, dtype or quantization.
        """

        if resolve_device(device).type == "cpu":
            # Before the first thread: threads that have a heap of their own leave freed memory to nobody else.
            keep_memory()

        def build() -> LocalBackend:
            shared = BASES_IN_USE.take(
                base_model,
                max_batch_size=max_batch_size,
                deterministic=deterministic,
                device=device,
                dtype=dtype,
                quantization=quantization,
                context_length=context_length,
                trust_remote_code=trust_remote_code,
                cache_dir=cache_dir,
            )
            lora = {"train_attn": train_attn, "train_mlp": train_mlp, "train_unembed": train_unembed}
            others = {"checkpoint_dir": checkpoint_dir, "untrained_logprobs": untrained_logprobs}
            return cls._over(shared, {"rank": rank, "alpha": alpha, "seed": seed, **lora}, **others)

        return await asyncio.to_thread(build)

    @classmethod
    def _over(cls, shared: SharedBase, lora: Mapping[str, Any], **options: Any) -> Self:
        """A backend with a fresh adapter, made by ``LoraAdapter.create``, over a base of ``BASES_IN_USE``."""
        try:
            backend = cls(shared, LoraAdapter.create(shared.base.model, **lora), **options)
        except BaseException:
            BASES_IN_USE.leave(shared)
            raise
        backend._release = partial(BASES_IN_USE.leave, shared)
        return backend

    # -- training ---------------------------------------------------------------------------------------------------

    @property
    def progress(self) -> tuple[int, int]:
        """``(done tokens, total tokens)`` of the current or last forward_backward."""
        return self._queue.progress

    @property
    def step(self) -> int:
        """Optimizer steps that made the current weights."""
        return self._model.step

    def forward_backward_async(
        self, data: list[tinker.Datum], *, loss_fn: types.LossFnType, loss_fn_config: dict[str, Any] | None = None
    ) -> OperationFuture[types.ForwardBackwardOutput]:
        """See ``Backend``. Cancelling the awaiting task stops it between micro-batches, with no gradient added."""

        def forward_backward(model: TrainableModel, progress: Progress) -> types.ForwardBackwardOutput:
            newest = self._newest() if self._newest else None
            if newest is not None:
                self._shared.rest(newest)  # the step needs that memory, and gives the next rollouts another version
            return model.forward_backward(data, loss_fn, loss_fn_config, progress)

        return self._submit(forward_backward)

    def forward_async(
        self, data: list[tinker.Datum], *, loss_fn: types.LossFnType, loss_fn_config: dict[str, Any] | None = None
    ) -> OperationFuture[types.ForwardBackwardOutput]:
        """See ``Backend``."""
        return self._submit(lambda model, progress: model.forward(data, loss_fn, loss_fn_config, progress))

    async def base_logprobs_async(self, data: list[tinker.Datum]) -> list[types.TensorData]:
        """See ``Backend``. One forward pass over the same tree."""

        def forward(model: TrainableModel, progress: Progress) -> list[types.TensorData]:
            return [output["logprobs"] for output in model.base_forward(data, progress).loss_fn_outputs]

        return await self._submit(forward)

    def forward_backward_custom_async(
        self, data: list[tinker.Datum], loss_fn: LossCallable
    ) -> OperationFuture[types.ForwardBackwardOutput]:
        """See ``Backend``. ``loss_fn`` runs in the training thread.

        Raises:
            DataError: ``loss_fn`` is not a function.
        """
        loss = checked_loss(loss_fn, bare=True)
        return self._submit(lambda model, progress: model.forward_backward_custom(data, loss, progress))

    def optim_step_async(self, adam: types.AdamParams) -> OperationFuture[types.OptimStepResponse]:
        """See ``Backend``."""
        return self._submit(lambda model, _: model.optim_step(adam))

    def discard_gradient_async(self) -> OperationFuture[None]:
        """Forget the accumulated gradient, for example after a cancelled job. *Extension.*"""
        return self._submit(lambda model, _: model.discard_gradient())

    # -- checkpoints ------------------------------------------------------------------------------------------------

    async def save_for_sampler(self, name: str, *, user_metadata: Mapping[str, Any] | None = None) -> str:
        """Write ``checkpoint_dir/sampler_weights/name`` as a PEFT directory; returns its path.

        Raises:
            CheckpointError: the name is refused or taken, or the disk refused the write.
        """
        return await self._submit(self._saving("sampler", name, user_metadata))

    async def save_full_state(self, name: str, *, user_metadata: Mapping[str, Any] | None = None) -> str:
        """Write ``checkpoint_dir/name``, a PEFT directory with the optimizer's state beside; returns its path.

        Raises:
            CheckpointError: the name is refused or taken, or the disk refused the write.
        """
        return await self._submit(self._saving("training", name, user_metadata))

    async def load_state(self, path: str, *, with_optimizer: bool = False) -> None:
        """Replace the weights by a checkpoint's (``start_from``), or with the moments (``load_checkpoint``)."""

        def load(model: TrainableModel, _: Progress) -> None:
            if with_optimizer:
                load_checkpoint(path, model, with_optimizer=True)
            else:
                start_from(path, model)

        await self._submit(load)

    async def delete_checkpoint(self, path: str) -> None:
        """See ``Backend``. Runs after earlier operations, so a pending save finishes first."""
        await self._submit(lambda *_: delete_checkpoint(path))

    # -- sampling ---------------------------------------------------------------------------------------------------

    def take_rollout_figures(self) -> dict[str, float]:
        """See ``Backend``."""
        return {} if self.rollouts is None else self.rollouts.take_figures()

    async def snapshot_sampling_client(self, name: str | None = None) -> SamplingClient:
        """See ``Backend``."""
        save = None if name is None else self._saving("sampler", name, None)

        def snapshot(model: TrainableModel, progress: Progress) -> tuple[LoraAdapter, int]:
            if save is not None:
                save(model, progress)
            return model.adapter.snapshot(), model.step

        adapter, version = await self._submit(snapshot)
        client = self._shared.sampler.client(adapter, version)
        self.policy_version, self._newest = version, weakref.ref(client)
        return await self._rollout_client(client, adapter)

    async def sampling_client(self, path: str) -> SamplingClient:
        """See ``Backend``."""

        def load(model: TrainableModel, _: Progress) -> tuple[LoraAdapter, int]:
            return load_adapter(path, self.base, like=model.adapter), read_checkpoint(path).step

        adapter, version = await self._submit(load)
        return await self._rollout_client(self._shared.sampler.client(adapter, version), adapter)

    def get_tokenizer(self) -> Any:
        """The Hugging Face tokenizer of the base model."""
        return self.base.tokenizer

    def get_architecture(self) -> Architecture:
        """See ``Backend``."""
        config = self.base.model.config.get_text_config()
        return Architecture(config.model_type, config.hidden_size)

    def get_image_reader(self) -> ReadsImages | str:
        """See ``Backend``."""
        if self.rollouts is not None:
            return "what vLLM samples is text only; leave `rollout_engine` out"
        return reader_or_reason(self.base.vision)

    # -- life -------------------------------------------------------------------------------------------------------

    async def is_healthy(self) -> bool:
        """True when the backend is open and a one-token forward pass gives finite logits.

        It does not wait behind the operations that are queued.
        """
        return not self._queue.closed and await asyncio.to_thread(self._shared.is_healthy)

    async def close(self) -> None:
        """Stop the running operation at its next micro-batch, fail the queued ones, free the memory. Idempotent."""
        is_first = not self._queue.closed
        await asyncio.to_thread(self._queue.close)
        if is_first:
            if self.rollouts is not None:
                await asyncio.to_thread(self.rollouts.close)
            await asyncio.to_thread(self._release)
        self._model.discard_gradient()

    # -- helpers ----------------------------------------------------------------------------------------------------

    def _submit(self, operation: Callable[[TrainableModel, Progress], T]) -> OperationFuture[T]:
        future: OperationFuture[T] = OperationFuture()
        return self._queue.submit(operation, future)

    def _saving(
        self, kind: Kind, name: str, user_metadata: Mapping[str, Any] | None
    ) -> Callable[[TrainableModel, Progress], str]:
        """The operation that saves a checkpoint where its kind belongs, and never over another."""
        directory = self.checkpoint_dir / SAMPLER_WEIGHTS if kind == "sampler" else self.checkpoint_dir

        def save(model: TrainableModel, _: Progress) -> str:
            target = checkpoint_path(directory, name)
            if target.exists() or target == self.checkpoint_dir / SAMPLER_WEIGHTS:
                raise CheckpointError(f"checkpoint {target} exists; choose another name, or delete it first")
            return str(save_checkpoint(directory, name, model, kind=kind, user_metadata=user_metadata))

        return save

    async def _rollout_client(self, client: LocalSamplingClient, adapter: LoraAdapter) -> SamplingClient:
        """What samples for ``client``."""
        if self.rollouts is None:
            return client
        return await self.rollouts.client(client, lambda data: self._logprobs_of(adapter, data))

    async def _logprobs_of(self, adapter: LoraAdapter, data: list[tinker.Datum]) -> list[np.ndarray]:
        """The learner's logprobs of each Datum's target_tokens, (N,), with these weights."""

        def forward(_: TrainableModel, progress: Progress) -> list[np.ndarray]:
            found = self._shared.train(adapter).forward(data, "cross_entropy", progress=progress)
            return [output["logprobs"].to_numpy() for output in found.loss_fn_outputs]

        return await self._submit(forward)
