"""The engine on a Ray cluster as a ``Backend``: replicas compute, and this process keeps adapter and optimizer."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nat_plugin_evsys.backends.local import LocalBackend
from nat_plugin_evsys.engine.model.images import ReadsImages
from nat_plugin_evsys.replicas.base import Replicas, ReplicatedBase
from nat_plugin_evsys.runtime import defaults
from nat_plugin_evsys.runtime.bases import BASES_IN_USE

if TYPE_CHECKING:
    from nat_plugin_evsys.config.ray import RayConfig


class RayBackend(LocalBackend):
    """A LoRA adapter over replicas of a base model.

    Each call's Datums are shared out by the distinct tokens of their prefix tree; the gradients are added up here in
    the order of the replicas, and one step is taken, whose weights go to the replicas with their next call. A replica
    that dies is started again by Ray, and what it was asked is run again.
    """

    @classmethod
    async def start(
        cls,
        base_model: str,
        ray: RayConfig,
        *,
        checkpoint_dir: Path,
        rank: int = defaults.RANK,
        alpha: float = defaults.ALPHA,
        seed: int | None = 0,
        train_attn: bool = defaults.TRAIN_ATTN,
        train_mlp: bool = defaults.TRAIN_MLP,
        train_unembed: bool = defaults.TRAIN_UNEMBED,
        max_batch_size: int = defaults.MAX_BATCH_SIZE,
        untrained_logprobs: bool = True,
        deterministic: bool = False,
        **options: Any,
    ) -> RayBackend:
        """Put a fresh adapter on replicas, which are started unless another backend of this process has them.

        To start from a checkpoint, ``load_state`` it next.

        Args:
            options: of ``load_base_model``.

        Raises:
            ConfigError: Ray is not installed, there is no such cluster, or it is too small.
            ModelError: the model cannot be loaded, lacks a selected LoRA target, or is another one on the cluster.
        """

        def build() -> RayBackend:
            shared = BASES_IN_USE.take(
                base_model,
                ReplicatedBase.open,
                replicas=Replicas(ray.replicas, ray.cpus_per_replica, ray.gpus_per_replica, ray.address),
                max_batch_size=max_batch_size,
                deterministic=deterministic,
                **options,
            )
            lora = {"train_attn": train_attn, "train_mlp": train_mlp, "train_unembed": train_unembed}
            others = {"checkpoint_dir": checkpoint_dir, "untrained_logprobs": untrained_logprobs}
            return cls._over(shared, {"rank": rank, "alpha": alpha, "seed": seed, **lora}, **others)

        return await asyncio.to_thread(build)

    def get_image_reader(self) -> ReadsImages | str:
        """See ``Backend``."""
        return "replicas on Ray read text only; leave `ray` out"

    def replicas(self) -> list[dict[str, Any]]:
        """The state of each replica; see ``ReplicaPool.status``. Blocks for up to a few seconds."""
        shared = self._shared
        assert isinstance(shared, ReplicatedBase)
        return shared.pool.status()
