"""The engine in this process as a ``Backend``."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from nat_plugin_evsys.backends.base import LossCallable, SamplingClient
from nat_plugin_evsys.engine.checkpoints import delete_checkpoint, load_adapter, load_checkpoint, save_checkpoint
from nat_plugin_evsys.engine.gradient.operations import OperationFuture
from nat_plugin_evsys.engine.gradient.queue import TrainingQueue
from nat_plugin_evsys.engine.gradient.trainable import Progress, TrainableModel
from nat_plugin_evsys.engine.model.loading import BaseModel, load_base_model
from nat_plugin_evsys.engine.model.lora import LoraAdapter, applied

if TYPE_CHECKING:
    import tinker
    from tinker import types

T = TypeVar("T")


class LocalBackend:
    """A LoRA adapter over a base model in this process.

    Operations run in submission order in a thread of the backend's own; the event loop is never blocked. A failed
    operation fails its own awaitable and leaves the next ones be.

    Attributes:
        base: the base model.
        checkpoint_dir: where ``save_for_sampler`` and ``save_full_state`` write; may be set at any time.
        policy_version: of the latest snapshot, -1 before the first.
    """

    def __init__(
        self,
        base: BaseModel,
        adapter: LoraAdapter,
        *,
        checkpoint_dir: Path,
        max_batch_size: int = 64,
        untrained_logprobs: bool = True,
    ) -> None:
        """``untrained_logprobs``: see ``TrainableModel``."""
        self.base = base
        self.checkpoint_dir = Path(checkpoint_dir)
        self.policy_version = -1
        self._max_batch_size = max_batch_size
        self._model = TrainableModel(base, adapter, untrained_logprobs=untrained_logprobs)
        self._queue = TrainingQueue(self._model)
        self._sampler: Any = None

    @classmethod
    async def create(
        cls,
        base_model: str,
        *,
        rank: int = 16,
        alpha: float = 32.0,
        seed: int | None = 0,
        train_attn: bool = True,
        train_mlp: bool = True,
        train_unembed: bool = False,
        checkpoint_dir: Path,
        device: str = "auto",
        dtype: str = "auto",
        context_length: int | None = None,
        max_batch_size: int = 64,
        trust_remote_code: bool = False,
        cache_dir: Path | None = None,
        untrained_logprobs: bool = True,
    ) -> LocalBackend:
        """Load the base model and put a fresh adapter on it. To start from a checkpoint, ``load_state`` it next.

        Raises:
            ModelError: the model cannot be loaded or lacks a selected LoRA target.
            ConfigError: unknown device or dtype.
        """

        def build() -> LocalBackend:
            base = load_base_model(
                base_model,
                device=device,
                dtype=dtype,
                context_length=context_length,
                trust_remote_code=trust_remote_code,
                cache_dir=cache_dir,
            )
            adapter = LoraAdapter.create(
                base.model,
                rank=rank,
                alpha=alpha,
                seed=seed,
                train_attn=train_attn,
                train_mlp=train_mlp,
                train_unembed=train_unembed,
            )
            return cls(
                base,
                adapter,
                checkpoint_dir=checkpoint_dir,
                max_batch_size=max_batch_size,
                untrained_logprobs=untrained_logprobs,
            )

        return await asyncio.to_thread(build)

    @property
    def progress(self) -> tuple[int, int]:
        """See ``Backend``."""
        return self._queue.progress

    @property
    def step(self) -> int:
        """Optimizer steps that made the current weights."""
        return self._model.step

    def forward_backward_async(
        self, data: list[tinker.Datum], *, loss_fn: types.LossFnType, loss_fn_config: dict[str, Any] | None = None
    ) -> OperationFuture[types.ForwardBackwardOutput]:
        """See ``Backend``. Cancelling the awaiting task stops it between micro-batches, with no gradient added."""
        return self._submit(lambda progress: self._model.forward_backward(data, loss_fn, loss_fn_config, progress))

    def forward_async(
        self, data: list[tinker.Datum], *, loss_fn: types.LossFnType, loss_fn_config: dict[str, Any] | None = None
    ) -> OperationFuture[types.ForwardBackwardOutput]:
        """See ``Backend``."""
        return self._submit(lambda progress: self._model.forward(data, loss_fn, loss_fn_config, progress))

    def forward_backward_custom_async(
        self, data: list[tinker.Datum], loss_fn: LossCallable
    ) -> OperationFuture[types.ForwardBackwardOutput]:
        """See ``Backend``. ``loss_fn`` runs in the training thread."""
        return self._submit(lambda progress: self._model.forward_backward_custom(data, loss_fn, progress))

    def optim_step_async(self, adam: types.AdamParams) -> OperationFuture[types.OptimStepResponse]:
        """See ``Backend``."""
        return self._submit(lambda _: self._model.optim_step(adam))

    def discard_gradient_async(self) -> OperationFuture[None]:
        """See ``Backend``."""
        return self._submit(lambda _: self._model.discard_gradient())

    async def save_for_sampler(self, name: str, *, user_metadata: Mapping[str, Any] | None = None) -> str:
        """Write ``checkpoint_dir/name`` as a PEFT directory; returns its path."""
        directory = self.checkpoint_dir
        return await self._submit(
            lambda _: str(save_checkpoint(directory, name, self._model, kind="sampler", user_metadata=user_metadata))
        )

    async def save_full_state(self, name: str, *, user_metadata: Mapping[str, Any] | None = None) -> str:
        """Write ``checkpoint_dir/name`` with the optimizer state; returns its path."""
        directory = self.checkpoint_dir
        return await self._submit(
            lambda _: str(save_checkpoint(directory, name, self._model, kind="training", user_metadata=user_metadata))
        )

    async def load_state(self, path: str, *, with_optimizer: bool = False) -> None:
        """Put a checkpoint's weights (and moments) in place of the current ones: ``checkpoints.load_checkpoint``."""
        await self._submit(lambda _: load_checkpoint(path, self._model, with_optimizer=with_optimizer))

    async def delete_checkpoint(self, path: str) -> None:
        """See ``Backend``. After what has been submitted, so a checkpoint that is being saved is saved first."""
        await self._submit(lambda _: delete_checkpoint(path))

    async def snapshot_sampling_client(self, name: str | None = None) -> SamplingClient:
        """See ``Backend``."""
        directory = self.checkpoint_dir

        def snapshot(_: Progress) -> tuple[LoraAdapter, int]:
            if name is not None:
                save_checkpoint(directory, name, self._model, kind="sampler")
            self.policy_version += 1
            return self._model.adapter.snapshot(), self.policy_version

        adapter, version = await self._submit(snapshot)
        return self._get_sampler().client(adapter, version)

    async def sampling_client(self, path: str) -> SamplingClient:
        """See ``Backend``."""

        def load(_: Progress) -> tuple[LoraAdapter, int]:
            adapter = load_adapter(path, self.base, like=self._model.adapter)
            self.policy_version += 1
            return adapter, self.policy_version

        adapter, version = await self._submit(load)
        return self._get_sampler().client(adapter, version)

    def base_sampling_client(self) -> SamplingClient:
        """A client that samples from the bare base model; its policy version is -1. *Extension.*"""
        return self._get_sampler().client(None, -1)

    def get_tokenizer(self) -> Any:
        """The Hugging Face tokenizer of the base model."""
        return self.base.tokenizer

    async def is_healthy(self) -> bool:
        """True when the backend is open and a one-token forward pass gives finite logits.

        It does not wait behind the operations that are queued.
        """
        if self._queue.closed:
            return False
        return await asyncio.to_thread(self._probe)

    async def close(self) -> None:
        """Stop the running operation at its next micro-batch, fail the queued ones, free the memory."""
        await asyncio.to_thread(self._queue.close)
        if self._sampler is not None:
            await asyncio.to_thread(self._sampler.close)
            self._sampler = None
        self._model.discard_gradient()

    def _submit(self, operation: Callable[[Progress], T]) -> OperationFuture[T]:
        future: OperationFuture[T] = OperationFuture()
        return self._queue.submit(lambda _, progress: operation(progress), future)

    def _get_sampler(self) -> Any:
        if self._sampler is None:
            from nat_plugin_evsys.engine.sampler import Sampler

            self._sampler = Sampler(self.base, max_batch_size=self._max_batch_size)
        return self._sampler

    def _probe(self) -> bool:
        ids = torch.zeros(1, 1, dtype=torch.int64, device=self.base.device)
        try:
            with torch.no_grad(), applied(None):
                logits = self.base.model(input_ids=ids, use_cache=False).logits
        except RuntimeError:
            # A broken device (lost GPU, out of memory) is exactly what this reports.
            return False
        return bool(torch.isfinite(logits).all())
