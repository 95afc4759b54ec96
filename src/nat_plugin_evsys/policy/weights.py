"""Where a policy's weights come from: a backend in this process, on a cluster or a service, and the checkpoint."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nat_plugin_evsys.address_space import require_address_space
from nat_plugin_evsys.errors import ConfigError
from nat_plugin_evsys.files import no_file
from nat_plugin_evsys.runs import is_service_path, newer_runs_notice, resolve_checkpoint

if TYPE_CHECKING:
    from nat_plugin_evsys.backends.base import Backend, SamplingClient
    from nat_plugin_evsys.backends.local import LocalBackend
    from nat_plugin_evsys.config.policy import EvsysPolicyConfig
    from nat_plugin_evsys.policy.chat import ChatRenderer

logger = logging.getLogger(__name__)


def starting_checkpoint(
    config: EvsysPolicyConfig, *, training: bool, is_named: Callable[[str], bool]
) -> Path | str | None:
    """The checkpoint that the policy starts from: a directory, a tinker:// path, or None for none.

    Args:
        is_named: whether the YAML calls the policy by this name.

    Raises:
        CheckpointError: there is no such run or checkpoint.
        ConfigError: it is on a service and there is no ``base_url``, or vice versa.
    """
    spec = config.checkpoint
    if training and spec in ("none", "latest", "best"):
        return None
    found = resolve_checkpoint(config.output_dir, spec, is_named)
    if found is not None:
        check_place(found, config.base_url)
    return found


def warn_of_newer_runs(config: EvsysPolicyConfig) -> None:
    """Say where `latest` or `best` serves an older run than the newest one."""
    notice = newer_runs_notice(config.output_dir, config.checkpoint)
    if notice is not None:
        logger.warning("checkpoint: %s: %s", config.checkpoint, notice)


def is_serving() -> bool:
    """Whether this process runs a command of `nat` that serves a policy, not one that trains it."""
    import click

    context, names = click.get_current_context(silent=True), set()
    while context is not None:
        names.add(context.info_name)
        context = context.parent
    return bool(names) and "finetune" not in names


def check_place(checkpoint: Path | str, base_url: str | None) -> None:
    """A service reads its own checkpoints alone, and the embedded engine those on disk.

    Raises:
        ConfigError: ``checkpoint`` is of the other kind.
    """
    if is_service_path(checkpoint) and base_url is None:
        raise ConfigError(f"{checkpoint} is on a Tinker service; set the policy's base_url to the one that has it")
    if not is_service_path(checkpoint) and base_url is not None:
        raise ConfigError(
            f"{checkpoint} is on this machine's disk, where the service at {base_url} cannot read it; remove "
            "base_url, or set checkpoint: to a tinker:// path"
        )


async def create_backend(config: EvsysPolicyConfig, *, train: bool, rollouts: bool = False) -> Backend:
    """The engine in this process, with ``ray`` on a cluster, or with ``base_url`` a session on the service there.

    Args:
        train: a fresh adapter is going to be trained; without it a service makes none before it is needed.
        rollouts: rollouts are going to be sampled, by vLLM if ``rollout_engine`` says so.
    """
    lora: dict[str, Any] = {
        "rank": config.lora_rank,
        "seed": config.seed,
        "train_attn": config.train_attn,
        "train_mlp": config.train_mlp,
        "train_unembed": config.train_unembed,
        "checkpoint_dir": config.output_dir / "checkpoints",
        "context_length": config.context_length,
    }
    if config.base_url is not None:
        from nat_plugin_evsys.backends.remote.backend import TinkerBackend
        from nat_plugin_evsys.backends.remote.service import TinkerService

        service = TinkerService.of(config)
        return await TinkerBackend.create(
            config.base_model, service=service, tokenizer=config.tokenizer, train=train, **lora
        )
    embedded: dict[str, Any] = {
        "untrained_logprobs": False,  # no job reads them: see learner_logprobs of training/fates.py
        "alpha": config.lora_alpha,
        "device": config.device,
        "dtype": config.dtype,
        "quantization": config.quantization,
        "max_batch_size": config.max_batch_size,
        "deterministic": config.deterministic,
        "trust_remote_code": config.trust_remote_code,
        **lora,
    }
    require_address_space()
    from nat_plugin_evsys.backends.local import LocalBackend

    backend: LocalBackend
    if config.ray is not None:
        from nat_plugin_evsys.backends.ray import RayBackend

        backend = await RayBackend.start(config.base_model, config.ray, **embedded)
    else:
        backend = await LocalBackend.create(config.base_model, **embedded)
    only_trains = config.ray is not None and (config.ray.gpus_per_replica or 0) > 1
    if config.rollout_engine == "vllm" and (rollouts or only_trains):
        await _sample_by_vllm(backend, config)
    return backend


async def _sample_by_vllm(backend: LocalBackend, config: EvsysPolicyConfig) -> None:
    """Let a vLLM server, which is started unless it runs, sample the backend's policy versions.

    Raises:
        ConfigError: vLLM is not installed, or cannot read the base model.
        ServiceUnavailableError: the server does not start.
    """
    from nat_plugin_evsys.backends.vllm.rollouts import VllmRollouts, model_for_vllm
    from nat_plugin_evsys.config.vllm import VllmConfig

    try:
        rollouts = backend.rollouts = VllmRollouts(
            backend.base,
            config.vllm or VllmConfig(),
            model_for_vllm(config.base_model),
            rank=config.lora_rank,
            temperature=config.temperature,
            max_batch_size=config.max_batch_size,
        )
        await asyncio.to_thread(rollouts.start)
    except BaseException:
        await backend.close()
        raise


async def first_client(backend: Backend, start: Path | str | None, *, training: bool) -> SamplingClient:
    """Samples from ``start``, or from a fresh adapter. Training starts from there too."""
    if start is None:
        return await backend.snapshot_sampling_client()
    logger.info("policy: %s %s", "training from" if training else "serving", start)
    if not training:
        return await backend.sampling_client(str(start))
    await backend.load_state(str(start))
    return await backend.snapshot_sampling_client()


def create_renderer(config: EvsysPolicyConfig, backend: Backend) -> ChatRenderer:
    """Messages -> token ids by the tokenizer's chat template, or by the one of ``chat_template``.

    Raises:
        ConfigError: no such template file, or the model has no template.
    """
    from nat_plugin_evsys.policy.chat import ChatRenderer

    template = config.chat_template
    if template is not None and not template.is_file():
        raise ConfigError(no_file("chat_template", template))
    return ChatRenderer(
        backend.get_tokenizer(),
        chat_template=None if template is None else template.read_text(encoding="utf-8"),
        enable_thinking=config.enable_thinking,
        split_thoughts=config.reasoning == "split",
        special_tokens=config.special_tokens,
        images=backend.get_image_reader(),
    )
