"""Policy versions on a vLLM server: each loaded under a new name, and measured before it is used."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import shutil
import tempfile
import weakref
from collections import deque
from collections.abc import Awaitable, Callable
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors import SafetensorError

from nat_plugin_evsys.backends.base import SamplingClient
from nat_plugin_evsys.backends.vllm.api import VllmApi
from nat_plugin_evsys.backends.vllm.client import VllmSamplingClient
from nat_plugin_evsys.backends.vllm.completions import probe_body, tokens_of
from nat_plugin_evsys.backends.vllm.drift import Drift, Probes, Scored
from nat_plugin_evsys.backends.vllm.figures import RolloutFigures
from nat_plugin_evsys.backends.vllm.server import VllmServer, find_program, serving_arguments
from nat_plugin_evsys.engine.model.loading import BaseModel, resolve_device
from nat_plugin_evsys.engine.model.lora import LoraAdapter
from nat_plugin_evsys.engine.model.peft_check import write_adapter
from nat_plugin_evsys.engine.sampling.client import LocalSamplingClient
from nat_plugin_evsys.errors import ConfigError, ServiceError

if TYPE_CHECKING:
    from tinker import types

    from nat_plugin_evsys.config.vllm import VllmConfig

logger = logging.getLogger(__name__)

Forward = Callable[[list["types.Datum"]], Awaitable[list[np.ndarray]]]
"""The learner's logprobs of each Datum's target_tokens, (N,), with the weights of a client."""


class VllmRollouts:
    """A vLLM server over one base model.

    Args:
        model: what ``vllm serve`` is given: a directory or a hub id.
        rank: of all adapters to come.
        temperature: of rollouts.
        max_batch_size: sequences that are sampled together.
    """

    def __init__(
        self, base: BaseModel, config: VllmConfig, model: str, *, rank: int, temperature: float, max_batch_size: int
    ) -> None:
        self._base = base
        self._config = config
        self._arguments = serving_arguments(
            model,
            rank=rank,
            dtype=str(base.dtype).removeprefix("torch."),
            context_length=base.context_length,
            sequences=max_batch_size,
            on_cpu=resolve_device("auto").type == "cpu",
        )
        self._figures = RolloutFigures(Probes(base.tokenizer, temperature))
        self._directory = Path(tempfile.mkdtemp(prefix="evsys-vllm-", dir=config.adapter_dir))
        self._names = (f"evsys-{secrets.token_hex(4)}-{number}" for number in count())
        self._retired: deque[str] = deque()
        self._server: VllmServer | None = None
        self._api: VllmApi | None = None

    def start(self) -> None:
        """Start the server, or another one in place of one that has ended. Blocks until it answers.

        Raises:
            ConfigError: vLLM is not installed.
            ServiceUnavailableError: it does not start; with what it said.
        """
        config = self._config
        if self._api is not None:
            if self._server is None or self._server.runs:
                return
            self._end_server()
        if config.base_url is not None:
            self._api = VllmApi(config.base_url, os.environ.get("VLLM_API_KEY"))
            return
        program = find_program(config.command)
        logger.info("rollouts: starting %s", program)
        server = VllmServer(program, [*self._arguments, *config.args], self._directory / "vllm.log")
        try:
            server.wait(config.start_timeout)
        except BaseException:
            server.close()
            raise
        self._server, self._api = server, VllmApi(server.url, server.key)

    async def client(self, embedded: LocalSamplingClient, forward: Forward) -> SamplingClient:
        """What samples the rollouts of this policy version: vLLM, or ``embedded`` where it fails or drifts too far."""
        version = embedded.policy_version
        try:
            client, drift = await self._loaded(embedded, forward)
        except ServiceError as error:
            logger.warning("rollouts: policy version %d is sampled by the embedded engine: %s", version, error)
            return embedded
        used = not drift.exceeds(self._config.max_kl)
        self._figures.measured(drift, used=used)
        if used:
            logger.info("rollouts: vLLM samples policy version %d: %s", version, drift)
            return client
        logger.warning(
            "rollouts: policy version %d is sampled by the embedded engine: vLLM computes something else than the "
            "learner, %s; vllm: {max_kl: %g}. Compare dtype, base model and, of a server of your own, its options.",
            version,
            drift,
            self._config.max_kl,
        )
        return embedded

    def take_figures(self) -> dict[str, float]:
        """See ``RolloutFigures.take``."""
        return self._figures.take()

    def close(self) -> None:
        """End the server and remove what was written for it. Idempotent."""
        self._end_server()
        shutil.rmtree(self._directory, ignore_errors=True)

    async def _loaded(self, embedded: LocalSamplingClient, forward: Forward) -> tuple[SamplingClient, Drift]:
        await asyncio.to_thread(self.start)
        assert self._api is not None
        await self._unload_retired(self._api)
        name = next(self._names)
        if embedded.adapter is None:
            raise ConfigError("rollout_engine: vllm samples from adapters alone")
        directory = self._directory / name
        await asyncio.to_thread(self._write, directory, embedded.adapter)
        client = VllmSamplingClient(embedded, self._api, name, self._figures)
        weakref.finalize(client, self._retired.append, name).atexit = False
        await self._api.load_adapter(name, directory)
        return client, await self._drift(self._api, name, forward)

    def _write(self, directory: Path, adapter: LoraAdapter) -> None:
        """Raises ServiceError if the disk refuses."""
        try:
            directory.mkdir()
            write_adapter(directory, self._base, adapter)
        except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk
            shutil.rmtree(directory, ignore_errors=True)
            raise ServiceError(f"its adapter could not be written to {directory}: {error}") from error

    async def _drift(self, api: VllmApi, name: str, forward: Forward) -> Drift:
        scored: list[Scored] = []
        for prompt, temperature in self._figures.probes:
            room = self._base.context_length - len(prompt)
            answer = await api.complete(probe_body(prompt, name, temperature, room))
            for choice in answer["choices"]:
                scored.append(Scored(prompt, *tokens_of(choice), temperature))
        return Drift.between(scored, await forward([each.datum() for each in scored]))

    async def _unload_retired(self, api: VllmApi) -> None:
        """Have the server forget versions that nobody samples from now."""
        while self._retired:
            name = self._retired.popleft()
            try:
                await api.unload_adapter(name)
            except ServiceError as error:
                logger.info("rollouts: %s", error)  # a server that was started again does not know it
            shutil.rmtree(self._directory / name, ignore_errors=True)

    def _end_server(self) -> None:
        if self._api is not None:
            self._api.close()
            self._api = None
        if self._server is not None:
            if not self._server.runs:
                logger.warning("rollouts: the vLLM server has ended by itself; it said:\n%s", self._server.said)
            self._server.close()
            self._server = None


def model_for_vllm(base_model: str) -> str:
    """What ``vllm serve`` is given for a base model: its directory on this machine, or its hub id.

    Raises:
        ConfigError: it is a GGUF file.
    """
    from nat_plugin_evsys.engine.model.loading import default_cache_dir
    from nat_plugin_evsys.engine.model.source import find_local

    source = find_local(base_model, default_cache_dir())
    if source is None:
        return base_model
    if source.gguf_file is not None:
        raise ConfigError(
            f"rollout_engine: vllm does not read {source.gguf_file.name}; give base_model as a Hugging Face directory "
            "or hub id"
        )
    return str(source.directory)
