"""The settings of ``nat evsys serve``."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, SecretStr, field_validator, model_validator

from nat_plugin_evsys.config.quantization import QUANTIZATION, Quantization
from nat_plugin_evsys.config.ray import RayConfig
from nat_plugin_evsys.config.strict import StrictConfig
from nat_plugin_evsys.config.urls import server_url
from nat_plugin_evsys.runtime import defaults

KEY_PREFIX = "tml-"
"""What the tinker SDK insists that a key starts with."""


def default_service_store() -> Path:
    """``$EVSYS_HOME/service``, else ``./.evsys/service``."""
    return Path(os.environ.get("EVSYS_HOME") or ".evsys").expanduser() / "service"


def is_loopback(host: str) -> bool:
    """True for an address, or ``localhost``, that only this machine reaches."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _usable_key(key: SecretStr) -> SecretStr:
    text = key.get_secret_value()
    # A key that a header cannot carry would never match; one shorter than 16 is too easy to guess.
    if not text.startswith(KEY_PREFIX) or len(text) < 16 or not text.isascii() or not text.isprintable():
        raise ValueError(
            f"an API key must start with `{KEY_PREFIX}` (the tinker SDK insists), have at least 16 printable "
            f"ASCII characters and no spaces at its ends; make one with `echo {KEY_PREFIX}$(openssl rand -hex 24)`"
        )
    if text != text.strip():
        raise ValueError("an API key must not begin or end with a space")
    return key


Key = Annotated[SecretStr, AfterValidator(_usable_key)]


class ServeConfig(StrictConfig):
    """One training and sampling server over the engine of this machine."""

    base_models: list[str] = Field(
        min_length=1,
        description="Models to load at startup: Hugging Face ids, local directories, `.gguf` files, or `builtin/…`.",
    )
    host: str = Field(default="127.0.0.1", description="Address to listen on; off loopback only with API keys.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    public_url: str | None = Field(
        default=None,
        description="Where clients reach the server behind a reverse proxy, such as `https://tinker.example.org`. "
        "Download URLs start with it; default is the address that the client connected to.",
    )
    store: Path = Field(
        default_factory=default_service_store, description="Directory of sessions, futures, model states, checkpoints."
    )
    api_keys: list[Key] = Field(default=[], description="Keys that may use the server; each sees only its own runs.")
    operator_key: Key | None = Field(
        default=None, description="One more key, the only one that may change the number of replicas."
    )
    policies: dict[str, str] = Field(
        default={}, description="Extra model names for the OpenAI endpoint: name -> tinker:// path."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="`auto`: CUDA when present, else CPU.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="`auto`: bfloat16 on CUDA, float32 on CPU."
    )
    quantization: Quantization = Field(default="none", description=QUANTIZATION)
    context_length: int | None = Field(
        default=None, ge=2, description="Limit of tokens in a sequence; default is the model's own limit."
    )
    max_batch_size: int = Field(
        default=defaults.MAX_BATCH_SIZE, ge=1, description="Sequences of one policy that are decoded together."
    )
    deterministic: bool = Field(
        default=False,
        description="The same operations give the same results, bit for bit, whatever else the server does: every "
        "sequence is sampled alone, and the server computes on one thread. Slower; see training.md.",
    )
    cache_dir: Path | None = Field(default=None, description="Where `builtin/…` models are kept.")
    trust_remote_code: bool = Field(default=False, description="Let transformers run code shipped with the model.")
    ray: RayConfig | None = Field(
        default=None, description="Replicas of every base model on a Ray cluster; default is this process alone."
    )
    log_format: Literal["text", "json"] = Field(default="text", description="Format of the log on stderr.")
    session_timeout: float = Field(
        default=1800.0, gt=0, description="Seconds without a request after which a session's models leave memory."
    )
    session_ttl: float = Field(
        default=7 * 86400.0, gt=0, description="Seconds without a request after which a session is forgotten."
    )
    model_memory_mib: int | None = Field(
        default=None,
        ge=1,
        description="Memory of the models in training, all bases together. Beyond it, those that ran longest ago are "
        "parked until their next request. Default is half of what is free once the base models are loaded.",
    )
    max_queued_per_owner: int = Field(default=4096, ge=1, description="Unfinished operations of one key.")
    max_queued: int = Field(default=16384, ge=1, description="Unfinished operations of all keys.")
    max_queued_bytes_per_owner: int = Field(
        default=4 << 30, ge=1, description="Bytes of the unfinished operations of one key, which wait in memory."
    )
    max_request_bytes: int = Field(default=64 << 20, ge=1024, description="Largest request body as it is sent.")
    max_decompressed_bytes: int = Field(default=128 << 20, ge=1024, description="Largest request body decompressed.")
    poll_seconds: float = Field(default=25.0, gt=0, le=40, description="Longest that a long poll is held.")
    housekeeping_seconds: float = Field(default=15.0, gt=0, description="Interval between checks for idle sessions.")
    shutdown_seconds: float = Field(default=30.0, gt=0, description="How long a shutdown waits for work to be parked.")
    retain_operations: bool = Field(
        default=False, description="Keep the payloads of all operations, so that the whole log can be replayed."
    )

    @field_validator("ray")
    @classmethod
    def _replicas_sample(cls, ray: RayConfig | None) -> RayConfig | None:
        if ray is not None and (ray.gpus_per_replica or 0) > 1:
            raise ValueError(
                f"gpus_per_replica is {ray.gpus_per_replica}: a model that is split over GPUs is trained, not sampled "
                "from, and a server does both; set it to 1, or train with `ray:` in a YAML and rollout_engine: vllm"
            )
        return ray

    @field_validator("public_url")
    @classmethod
    def _public_url_is_one(cls, url: str | None) -> str | None:
        return server_url("public_url", url, "https://tinker.example.org")

    @model_validator(mode="after")
    def _settings_go_together(self) -> ServeConfig:
        if not self.api_keys and self.operator_key is None and not is_loopback(self.host):
            raise ValueError(
                f"host {self.host} can be reached from other machines, and there is no API key; give --api-key "
                "(or EVSYS_API_KEYS, or --api-key-file), or listen on 127.0.0.1"
            )
        if self.deterministic and self.max_batch_size != defaults.MAX_BATCH_SIZE:
            raise ValueError("max_batch_size has no effect with deterministic, which samples each sequence alone")
        if self.session_ttl < self.session_timeout:
            raise ValueError("session_ttl must not be shorter than session_timeout")
        return self
