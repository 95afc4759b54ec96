"""``ray: {…}``: replicas of the base model on a Ray cluster."""

from __future__ import annotations

from pydantic import Field, field_validator

from nat_plugin_evsys.config.strict import StrictConfig


class RayConfig(StrictConfig):
    """Replicas of the base model on a Ray cluster, which train and sample together; see scaling.md."""

    replicas: int = Field(ge=1, description="Copies of the base model, each a process that Ray places and restarts.")
    gpus_per_replica: int | None = Field(
        default=None,
        ge=0,
        description="GPUs of each replica: 0 or 1; default is 1 if the cluster has GPUs. A model that is split over "
        "several GPUs is not offered yet.",
    )
    cpus_per_replica: int = Field(default=1, ge=1, description="CPU cores of each replica, and threads it computes on.")
    address: str | None = Field(
        default=None,
        description="A running cluster's address (`auto`: the one of this machine, or HOST:PORT); default is a new "
        "cluster on this machine, which ends with the process.",
    )

    @field_validator("gpus_per_replica")
    @classmethod
    def _one_gpu_each(cls, value: int | None) -> int | None:
        if value is not None and value > 1:
            raise ValueError(
                f"gpus_per_replica is {value}: a replica's model is not split over GPUs yet; set it to 1, or train a "
                "model that fits on one GPU"
            )
        return value
