"""``vllm: {…}``: the vLLM server that samples the rollouts of a policy under training."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, field_validator, model_validator

from nat_plugin_evsys.config.strict import StrictConfig
from nat_plugin_evsys.config.urls import server_url


class VllmConfig(StrictConfig):
    """A vLLM server, started here or running already, that samples rollouts; see scaling.md."""

    command: str = Field(
        default="vllm",
        description="vLLM's program: a name on the PATH or a path such as `/opt/vllm/bin/vllm`. It needs an "
        "environment of its own, since it pins other versions of torch and llguidance than this package takes.",
    )
    args: list[str] = Field(
        default_factory=list,
        description="More arguments of `vllm serve`, such as `--gpu-memory-utilization=0.5` or `--enforce-eager`.",
    )
    start_timeout: float = Field(default=900.0, gt=0, description="Seconds that the server may take to start.")
    base_url: str | None = Field(
        default=None,
        description="A server that runs already, such as `http://127.0.0.1:8000`, instead of one that is started; it "
        "needs the options of scaling.md. Its key is taken from `VLLM_API_KEY`, if it has one.",
    )
    adapter_dir: Path | None = Field(
        default=None,
        description="With base_url: a directory that this machine and the server both see under this path, through "
        "which adapters reach it; default is a temporary directory of this machine.",
    )
    max_kl: float = Field(
        default=0.015,
        gt=0,
        allow_inf_nan=False,
        description="Largest drift: the KL divergence per token of the learner's distribution from vLLM's, estimated "
        "at each policy version. Above it that version is sampled by the embedded engine, with a warning.",
    )

    @field_validator("base_url")
    @classmethod
    def _plain_url(cls, value: str | None) -> str | None:
        url = server_url("vllm.base_url", value)
        return url and url.removesuffix("/v1")

    @model_validator(mode="after")
    def _started_or_running(self) -> VllmConfig:
        started = [name for name in ("command", "args", "start_timeout") if name in self.model_fields_set]
        if self.base_url is not None and started:
            raise ValueError(f"vllm: base_url names a server that runs already, so {', '.join(started)}: remove it")
        if self.base_url is None and self.adapter_dir is not None:
            raise ValueError("vllm: adapter_dir without base_url has no effect; remove it")
        return self
