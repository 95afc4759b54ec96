"""The policy: base model + LoRA adapter at a policy version, with the endpoint that serves it and records its calls.

One per policy configuration and process: NAT builds and closes its components several times in one `nat finetune`,
and each of them must find the same weights.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import threading
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import Future
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from nat_plugin_evsys.calls import RUN_ID_HEADER, RunKind
from nat_plugin_evsys.errors import ConfigError, EvsysError
from nat_plugin_evsys.garbage import freeze
from nat_plugin_evsys.policy.endpoint import PolicyEndpoint, SamplingDefaults
from nat_plugin_evsys.policy.recorder import Recorder
from nat_plugin_evsys.policy.weights import (
    create_backend,
    create_renderer,
    first_client,
    is_serving,
    starting_checkpoint,
    warn_of_newer_runs,
)

if TYPE_CHECKING:
    from langchain_openai import ChatOpenAI
    from nat.builder.builder import Builder
    from nat.builder.framework_enum import LLMFrameworkEnum

    from nat_plugin_evsys.backends.base import Backend, SamplingClient
    from nat_plugin_evsys.config.policy import EvsysPolicyConfig
    from nat_plugin_evsys.policy.chat import ChatRenderer

logger = logging.getLogger(__name__)


class Policy:
    """The one owner of the model. The model is loaded at the first call or by the trainer, never at construction."""

    _instances: ClassVar[dict[str, Policy]] = {}
    _instances_lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, config: EvsysPolicyConfig) -> None:
        self.config = config
        self.recorder = Recorder()
        self._training = False
        self._resuming = False
        self._backend: Backend | None = None
        self._renderer: ChatRenderer | None = None
        self._client: SamplingClient | None = None
        self._held: SamplingClient | None = None
        self._loading: Future[None] | None = None
        self._lock = threading.Lock()
        self._endpoint: PolicyEndpoint | None = None
        self._builder: Builder | None = None

    @classmethod
    def of(cls, config: EvsysPolicyConfig) -> Policy:
        """The policy of this configuration; the same object for an equal configuration."""
        key = config.model_dump_json()
        with cls._instances_lock:
            if key not in cls._instances:
                cls._instances[key] = cls(config)
            return cls._instances[key]

    @classmethod
    def all(cls) -> list[Policy]:
        """Every policy of this process."""
        with cls._instances_lock:
            return list(cls._instances.values())

    @classmethod
    def named(cls, name: str, builder: Builder) -> Policy:
        """The policy that the YAML calls ``name``.

        Raises:
            ConfigError: there is no such LLM, or it is of another type.
        """
        from nat_plugin_evsys.config.policy import EvsysPolicyConfig

        try:
            config = builder.get_llm_config(name)
        except ValueError as error:
            raise ConfigError(
                f"trainer adapter: policy `{name}` is not among `llms:`; name an evsys_policy LLM"
            ) from error
        if not isinstance(config, EvsysPolicyConfig):
            raise ConfigError(
                f"trainer adapter: policy `{name}` is of type `{config.type}`; it must be `_type: evsys_policy`"
            )
        return cls.of(config)

    def configured_by(self, builder: Builder) -> None:
        """Remember who built this policy last: NAT's builder knows by which names the YAML calls it."""
        self._builder = builder

    def answers_to(self, name: str) -> bool:
        """Whether requests may ask for the policy by this name: its base model's, or one that the YAML gives it."""
        return name == self.config.base_model or self.is_named(name)

    def is_named(self, name: str) -> bool:
        """Whether the YAML calls the policy by this name."""
        try:
            return self._builder is not None and self._builder.get_llm_config(name) == self.config
        except ValueError:  # no LLM of that name
            return False

    # -- serving ----------------------------------------------------------------------------------------------------

    @property
    def endpoint(self) -> PolicyEndpoint:
        """The OpenAI-compatible endpoint, started at the first use.

        Raises:
            ConfigError: it cannot listen on its address.
            EvsysError: the server did not come up.
        """
        with self._lock:
            if self._endpoint is None:
                key = self.config.api_key
                endpoint = PolicyEndpoint(
                    renderer=self._current_renderer,
                    sampling_client=self._current_client,
                    held_client=lambda: self._held,
                    recorder=self.recorder,
                    defaults=self._sampling_defaults,
                    model_names=[self.config.base_model],
                    is_alias=self.answers_to,
                    hints=self.config.hints,
                    host=self.config.host,
                    port=self.config.port,
                    api_key=None if key is None else key.get_secret_value(),
                )
                endpoint.start()
                logger.info("policy endpoint: %s", endpoint.base_url)
                self._endpoint = endpoint
            return self._endpoint

    def open_run(self, headers: Mapping[str, str]) -> str | None:
        """The rollout that these attribution headers name, if it is going on."""
        run_id = headers.get(RUN_ID_HEADER)
        return None if self.recorder.kind_of(run_id) is None else run_id

    @asynccontextmanager
    async def langchain_client(self) -> AsyncIterator[ChatOpenAI]:
        """A ChatOpenAI bound to the endpoint; its calls carry NAT's run and step ids."""
        from nat_plugin_evsys.policy.client import open_langchain_client

        async with open_langchain_client(
            self.endpoint,
            model=self.config.base_model,
            timeout=self.config.request_timeout,
            disable_streaming=self.config.disable_streaming,
            use_responses_api=self.config.api_type == "responses",
        ) as client:
            yield client

    @asynccontextmanager
    async def framework_client(self, framework: LLMFrameworkEnum) -> AsyncIterator[Any]:
        """The client of another framework, bound to the endpoint; see ``open_framework_client``.

        Raises:
            ConfigError: ``api_type: responses``, which LangChain's client alone speaks.
        """
        if self.config.api_type == "responses":
            raise ConfigError(
                f"api_type: responses is for LangChain, whose client speaks that API, and not for {framework.value}; "
                "remove it (any client may call the policy endpoint's /v1/responses)"
            )
        from nat_plugin_evsys.policy.frameworks import open_framework_client

        async with open_framework_client(
            framework, self.endpoint, model=self.config.base_model, timeout=self.config.request_timeout
        ) as client:
            yield client

    def _sampling_defaults(self, kind: RunKind | None) -> SamplingDefaults:
        config = self.config
        temperature = config.temperature if kind == "rollout" else config.eval_temperature
        return SamplingDefaults(temperature=temperature, top_p=config.top_p, max_tokens=config.max_tokens)

    async def _current_client(self) -> SamplingClient:
        await self.ensure_loaded()
        assert self._client is not None
        return self._client

    async def _current_renderer(self) -> ChatRenderer:
        await self.ensure_loaded()
        return self.renderer

    # -- the model --------------------------------------------------------------------------------------------------

    @property
    def backend(self) -> Backend:
        """The training backend. Call ``ensure_loaded`` first."""
        if self._backend is None:
            raise EvsysError("the policy's model is not loaded yet; await Policy.ensure_loaded() first")
        return self._backend

    @property
    def renderer(self) -> ChatRenderer:
        """Messages -> token ids, by the model's chat template. Call ``ensure_loaded`` first."""
        if self._renderer is None:
            raise EvsysError("the policy's model is not loaded yet; await Policy.ensure_loaded() first")
        return self._renderer

    @property
    def version(self) -> int:
        """Version of the adapter that is being served; -1 before the model is loaded."""
        return -1 if self._client is None else self._client.policy_version

    def begin_training(self, *, resuming: bool = False) -> None:
        """Start from a new adapter (or from ``checkpoint`` where it is a path) instead of serving `latest` or `best`.

        Args:
            resuming: the weights of an earlier run are loaded next, so a service need not make an adapter before.

        Raises:
            EvsysError: the model has been loaded for serving already.
        """
        if self._backend is not None and not self._training:
            raise EvsysError("this process already serves the policy; run `nat finetune` in its own process")
        self._training = True
        self._resuming = resuming

    def check_servable(self) -> None:
        """Fail where a serving command (`nat run`, `nat eval`, `nat serve`) would find no checkpoint at its first call.

        NAT answers a failed call with an apology and exits 0. Nothing is checked in `nat finetune`, nor where no
        command of `nat` is running: NAT builds the workflow before it says what for.

        Raises:
            CheckpointError, ConfigError: ``checkpoint`` leads to none.
        """
        if is_serving() and self._backend is None:
            starting_checkpoint(self.config, training=self._training, is_named=self.is_named)

    async def ensure_loaded(self) -> None:
        """Load the base model and the starting checkpoint, once, whichever thread or event loop asks first."""
        with self._lock:
            if self._loading is None:
                self._loading = Future()
                threading.Thread(target=self._load, args=(self._loading,), name="evsys-load", daemon=True).start()
            loading = self._loading
        if loading.done():  # the usual case, at every call: nothing to wait for
            return loading.result()
        await asyncio.shield(asyncio.wrap_future(loading))

    def _load(self, done: Future[None]) -> None:
        try:
            asyncio.run(self._load_async())
            if not self._training:  # a run freezes more, later
                freeze()  # `nat run` and `nat serve` serve from here on: a full collection would stop them for 0.5 s
        except BaseException as error:  # noqa: BLE001 - handed to whoever awaits the loading
            with self._lock:
                self._loading = None  # the cause may be mended (a run finished meanwhile): the next call tries again
            done.set_exception(error)
        else:
            done.set_result(None)

    async def _load_async(self) -> None:
        start = starting_checkpoint(self.config, training=self._training, is_named=self.is_named)
        if not self._training:
            warn_of_newer_runs(self.config)
        fresh = self._training and start is None and not self._resuming
        backend = self._backend or await create_backend(self.config, train=fresh, rollouts=self._training)
        self._backend = backend  # also of a load that fails below: the next one takes it, and `close` frees it
        self._renderer = create_renderer(self.config, backend)
        self._client = await first_client(backend, start, training=self._training)

    def set_checkpoint_dir(self, path: Path) -> None:
        """Save checkpoints under ``path`` from now on."""
        self.backend.checkpoint_dir = path

    async def publish(self, name: str | None = None) -> int:
        """Serve the current weights as the next policy version; calls in flight finish on theirs.

        Returns:
            The new policy version. With ``name`` the weights are also saved as a checkpoint of that name.
        """
        self._client = await self.backend.snapshot_sampling_client(name)
        return self._client.policy_version

    def hold_rollouts(self) -> None:
        """Let rollouts sample from the current weights, whatever is published, until ``release_rollouts``."""
        self._held = self._client

    async def hold_rollouts_at(self, checkpoint: Path | str) -> None:
        """The same with the weights of a checkpoint.

        Raises:
            CheckpointError: missing, torn, or another model's.
        """
        self._held = await self.backend.sampling_client(str(checkpoint))

    def release_rollouts(self) -> None:
        """Let rollouts sample from the current weights again."""
        self._held = None

    async def is_healthy(self) -> bool:
        """True when the model is loaded and the backend answers a real request."""
        return self._backend is not None and await self._backend.is_healthy()

    async def close(self) -> None:
        """Stop the endpoint and free the model."""
        with self._instances_lock:
            for key in [key for key, policy in self._instances.items() if policy is self]:
                del self._instances[key]
        self._stop_endpoint()
        if self._backend is not None:
            await self._backend.close()

    def _stop_endpoint(self) -> None:
        if self._endpoint is not None:
            self._endpoint.close()
            self._endpoint = None


@atexit.register
def _stop_endpoints() -> None:
    for policy in list(Policy._instances.values()):
        policy._stop_endpoint()
