"""``ray: {…}``: replicas of the base model on a Ray cluster."""

from __future__ import annotations

from pydantic import Field

from nat_plugin_evsys.config.strict import StrictConfig


class RayConfig(StrictConfig):
    """Replicas of the base model on a Ray cluster, which train and sample together; see scaling.md."""

    replicas: int = Field(ge=1, description="Copies of the base model, each a process that Ray places and restarts.")
    gpus_per_replica: int | None = Field(
        default=None,
        ge=0,
        description="GPUs of each replica; default is 1 if the cluster has GPUs. Over several (of one machine) the "
        "model is split by transformers' tensor-parallel plan; they train, and `rollout_engine: vllm` samples.",
    )
    cpus_per_replica: int = Field(default=1, ge=1, description="CPU cores of each replica, and threads it computes on.")
    address: str | None = Field(
        default=None,
        description="A running cluster's address (`auto`: the one of this machine, or HOST:PORT); default is a new "
        "cluster on this machine, which ends with the process.",
    )
