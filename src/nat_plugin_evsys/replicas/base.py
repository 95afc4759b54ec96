"""A base model whose passes and samples are computed by replicas; this process keeps adapters and optimizers."""

from __future__ import annotations

from typing import Any

from nat_plugin_evsys.engine.gradient.steps import Steps
from nat_plugin_evsys.engine.model.loading import BaseModel, load_base_model
from nat_plugin_evsys.engine.model.lora import LoraAdapter
from nat_plugin_evsys.errors import EvsysError, ModelError
from nat_plugin_evsys.replicas.cluster import Replicas as Replicas
from nat_plugin_evsys.replicas.passes import ReplicaSettings
from nat_plugin_evsys.replicas.pool import ReplicaPool
from nat_plugin_evsys.replicas.sampling import ReplicaSampler
from nat_plugin_evsys.replicas.steps import ReplicaSteps
from nat_plugin_evsys.runtime import defaults
from nat_plugin_evsys.runtime.bases import SharedBase


class ReplicatedBase(SharedBase):
    """``SharedBase`` over a pool. Its own copy of the model is on the CPU, in the dtype of the replicas, and says what
    shapes the adapters have."""

    def __init__(self, base: BaseModel, pool: ReplicaPool, max_batch_size: int, *, deterministic: bool = False) -> None:
        super().__init__(base, max_batch_size, deterministic=deterministic)
        self.pool = pool

    @classmethod
    def open(
        cls,
        base_model: str,
        *,
        replicas: Replicas,
        max_batch_size: int = defaults.MAX_BATCH_SIZE,
        deterministic: bool = False,
        **options: Any,
    ) -> ReplicatedBase:
        """Start the replicas.

        Args:
            options: of ``load_base_model``; ``device`` is that of the replicas.

        Raises:
            ConfigError: Ray is not installed, there is no such cluster, or it is too small.
            ModelError: the base model cannot be loaded, or is another one on the cluster.
        """
        settings = ReplicaSettings(base_model, options, max_batch_size, deterministic, replicas.cpus)
        here = {**options, "device": "cpu"}
        try:
            pool = ReplicaPool(settings, replicas)
        except EvsysError:
            load_base_model(base_model, **here)  # if it cannot be loaded here either, that says it best
            raise
        try:
            base = load_base_model(base_model, **here | {"dtype": pool.dtype})
        except BaseException:
            pool.close()
            raise
        if pool.identity != base.identity:
            pool.close()
            raise ModelError(f"ray: {base_model} is another model on the cluster than here; give the same files to all")
        return cls(base, pool, max_batch_size, deterministic=deterministic)

    def is_healthy(self) -> bool:
        """True when every replica gives finite logits."""
        return self.pool.is_healthy()

    def close(self) -> None:
        """Fail what is being sampled, end the replicas and leave the cluster."""
        super().close()
        self.pool.close()

    def _new_sampler(self) -> ReplicaSampler:
        return ReplicaSampler(self.base, self.pool)

    def _steps(self, adapter: LoraAdapter) -> Steps:
        return ReplicaSteps(self.pool, adapter)
