"""The entry point: creates training and sampling clients over base models that are loaded once."""

from __future__ import annotations

import json
import sys
import uuid
import weakref
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Self, TypeVar

from tinker import types

from nat_plugin_evsys.clients.futures import ClientFuture, ResultFuture
from nat_plugin_evsys.clients.handles import SamplerHandle
from nat_plugin_evsys.clients.loops import CheckpointFilesResponse, WandbConfig
from nat_plugin_evsys.clients.methods import answers, awaits, refuses
from nat_plugin_evsys.clients.rest import RestClient
from nat_plugin_evsys.clients.sampling import SamplingClient, SamplingClientFuture, Weights
from nat_plugin_evsys.clients.training import TrainingClient, TrainingClientFuture
from nat_plugin_evsys.clients.wandb_stream import WandbStream, check_wandb_config
from nat_plugin_evsys.engine.checkpoint_loading import load_adapter
from nat_plugin_evsys.engine.checkpoints import read_checkpoint
from nat_plugin_evsys.engine.gradient.trainable import TrainableModel
from nat_plugin_evsys.engine.model.builtin import available_builtins
from nat_plugin_evsys.engine.model.loading import BaseModel
from nat_plugin_evsys.engine.model.targets import linear_roles
from nat_plugin_evsys.errors import ConfigError, EngineClosedError
from nat_plugin_evsys.runtime import defaults
from nat_plugin_evsys.runtime.arguments import (
    check_api_key,
    check_flag,
    check_int,
    check_lora_config,
    check_metadata,
    check_optimizer,
    check_retry_config,
    check_seed,
    check_text,
    refuse_options,
)
from nat_plugin_evsys.runtime.bases import BASE_POLICY_VERSION, BaseModels, SharedBase
from nat_plugin_evsys.runtime.checkpoint_store import CheckpointStore, default_store
from nat_plugin_evsys.runtime.extensions import SupportedModel
from nat_plugin_evsys.runtime.runs import RunRecord

if TYPE_CHECKING:
    from tinker.lib.retry_handler import RetryConfig

F = TypeVar("F", bound=ClientFuture[Any] | ResultFuture[Any])

_WORKERS = 4


class ServiceClient:
    """Tinker's ServiceClient with the engine in this process: no server, no key.

    Each base model is loaded once, however many training and sampling clients use it. Creating calls check their
    arguments at once and return a future of the client, which may be used as the client itself. Also a context manager.

    Args:
        user_metadata: put into the metadata of each training run.
        api_key: accepted and ignored, since programs for services pass one.
        project_id, display_name, base_url, default_headers_overrides: refused, as there is no server.
        store: directory of the checkpoints; default ``$EVSYS_HOME/checkpoints``, else ``./.evsys/checkpoints``.
            *Extension*, as are all below.
        device, dtype, quantization: see ``engine.model.loading.load_base_model``.
        context_length: most tokens of a sequence, if fewer than the model's own.
        max_batch_size: most sequences of one policy version that are decoded together.
        trust_remote_code: let a model run its own code.
        cache_dir: where ``builtin/…`` models are kept.

    Raises:
        UnsupportedError: a refused argument.
        ConfigError: a malformed one.
    """

    def __init__(
        self,
        user_metadata: dict[str, str] | None = None,
        project_id: None = None,
        *,
        display_name: None = None,
        base_url: None = None,
        api_key: str | None = None,
        default_headers_overrides: None = None,
        store: Path | str | None = None,
        device: str = defaults.DEVICE,
        dtype: str = defaults.DTYPE,
        quantization: str = defaults.QUANTIZATION,
        context_length: int | None = None,
        max_batch_size: int = defaults.MAX_BATCH_SIZE,
        trust_remote_code: bool = False,
        cache_dir: Path | str | None = None,
    ) -> None:
        refuse_options(
            project_id=project_id,
            display_name=display_name,
            base_url=base_url,
            default_headers_overrides=default_headers_overrides,
        )
        check_api_key(api_key)
        if context_length is not None:
            check_int("context_length", context_length, least=2)
        self.session_id = str(uuid.uuid4())
        self.store = CheckpointStore(default_store() if store is None else Path(store))
        self._user_metadata = check_metadata(user_metadata)
        self._options: dict[str, Any] = {
            "max_batch_size": check_int("max_batch_size", max_batch_size, least=1),
            "device": check_text("device", device),
            "dtype": check_text("dtype", dtype),
            "quantization": check_text("quantization", quantization),
            "context_length": context_length,
            "trust_remote_code": check_flag("trust_remote_code", trust_remote_code),
            "cache_dir": None if cache_dir is None else str(cache_dir),
        }
        self._bases = BaseModels(**{**self._options, "cache_dir": None if cache_dir is None else Path(cache_dir)})
        self._executor = ThreadPoolExecutor(_WORKERS, thread_name_prefix="evsys-service")
        self._lock = Lock()
        self._clients: weakref.WeakValueDictionary[str, TrainingClient] = weakref.WeakValueDictionary()
        self._models = 0
        self._closed = False
        # One that nobody refers to, neither its clients nor their requests, takes its base models along.
        weakref.finalize(self, self._bases.close).atexit = False
        weakref.finalize(self, self._executor.shutdown, wait=False).atexit = False
        _SERVICES[self.session_id] = self

    def __enter__(self) -> Self:
        self._check_open()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # -- training clients

    def create_lora_training_client(
        self,
        base_model: str,
        rank: int = defaults.RANK,
        seed: int | None = None,
        train_mlp: bool = defaults.TRAIN_MLP,
        train_attn: bool = defaults.TRAIN_ATTN,
        train_unembed: bool = defaults.TINKER_TRAIN_UNEMBED,
        user_metadata: dict[str, str] | None = None,
        optimizer: types.OptimizerConfig | None = None,
        *,
        wandb_config: WandbConfig | None = None,
    ) -> ClientFuture[TrainingClient]:
        """A future of a client with a fresh adapter: A kaiming-uniform, B zero, alpha 32, scale alpha / rank.

        Args:
            base_model: ``builtin/smollm2-135m``, a directory, a GGUF file, or a Hugging Face hub id.
            rank: r of the LoRA matrices.
            seed: of A; None draws one.
            train_mlp, train_attn, train_unembed: which layers get matrices; at least one.
            user_metadata: of the training run, from strings to strings.
            optimizer: AdamW, the only one.
            wandb_config: a run of Weights & Biases that the client's metrics are streamed to. *Extension* (Loops).

        Raises:
            ConfigError: a malformed argument, or a wandb_config where wandb is not installed.
            UnsupportedError: another optimizer.
            EngineClosedError: the ServiceClient has been closed.
            ModelError: (through the future) the model cannot be loaded or lacks a layer asked for.
        """
        check_text("base_model", base_model)
        lora: dict[str, Any] = {
            "rank": check_int("rank", rank, least=1),
            "seed": check_seed(seed),
            "train_mlp": check_flag("train_mlp", train_mlp),
            "train_attn": check_flag("train_attn", train_attn),
            "train_unembed": check_flag("train_unembed", train_unembed),
        }
        if not (train_mlp or train_attn or train_unembed):
            raise ConfigError("nothing to train: set at least one of train_mlp, train_attn, train_unembed to True")
        check_optimizer(optimizer)
        wandb = check_wandb_config(wandb_config)
        metadata, model_id = self._metadata(user_metadata), self._next_model_id()

        def create() -> TrainingClient:
            shared = self._bases.get(base_model)
            return self._register(model_id, shared, shared.fresh(**lora), metadata, wandb)

        return self._submit(create, TrainingClientFuture)

    create_lora_training_client_async = awaits(create_lora_training_client)

    def create_model(
        self, base_model: str, lora_config: Mapping[str, Any] | types.LoraConfig | None = None
    ) -> ClientFuture[TrainingClient]:
        """Weaver's name for ``create_lora_training_client``. *Extension.*

        Args:
            base_model: as there.
            lora_config: ``rank``, ``seed``, ``train_mlp``, ``train_attn``, ``train_unembed``; a dict or a
                ``types.LoraConfig``.

        Raises:
            ConfigError: an unknown key or a malformed value.
        """
        return self.create_lora_training_client(base_model, **check_lora_config(lora_config).model_dump())

    create_model_async = awaits(create_model)

    def create_training_client_from_state(
        self,
        path: str,
        base_model: str | None = None,
        user_metadata: dict[str, str] | None = None,
        weights_access_token: str | None = None,
        optimizer: types.OptimizerConfig | None = None,
    ) -> ClientFuture[TrainingClient]:
        """A future of a client with a checkpoint's LoRA shape and weights, and a fresh optimizer.

        Args:
            path: ``tinker://…`` of this store, or a checkpoint's directory.
            base_model: where the base model is, if no longer where the checkpoint says; it must be the same model.
            user_metadata: of the new training run.
            weights_access_token: refused.
            optimizer: AdamW, the only one.

        Raises:
            ConfigError, UnsupportedError, EngineClosedError: as ``create_lora_training_client``.
            CheckpointError: (through the future) missing, expired, torn, or made for another base model.
            ModelError: (through the future) the base model cannot be loaded.
        """
        check_optimizer(optimizer)
        return self._from_state(path, base_model, user_metadata, weights_access_token, with_optimizer=False)

    create_training_client_from_state_async = awaits(create_training_client_from_state)

    def create_training_client_from_state_with_optimizer(
        self,
        path: str,
        base_model: str | None = None,
        user_metadata: dict[str, str] | None = None,
        weights_access_token: str | None = None,
    ) -> ClientFuture[TrainingClient]:
        """``create_training_client_from_state`` with the optimizer's moments: training resumes bit for bit (CPU)."""
        return self._from_state(path, base_model, user_metadata, weights_access_token, with_optimizer=True)

    create_training_client_from_state_with_optimizer_async = awaits(create_training_client_from_state_with_optimizer)

    # -- sampling clients

    def create_sampling_client(
        self,
        model_path: str | None = None,
        base_model: str | None = None,
        retry_config: RetryConfig | None = None,
        record_stability_info: bool = False,
    ) -> ClientFuture[SamplingClient]:
        """A future of a client that samples from saved weights, or from a bare base model.

        Args:
            model_path: ``tinker://…`` of this store, or a checkpoint's directory.
            base_model: alone, the base model to sample from; with model_path, where the checkpoint's base model is.
            retry_config: accepted and ignored; a call inside one process has no connection to lose.
            record_stability_info: refused.

        Raises:
            ConfigError: neither was given, or one is malformed.
            UnsupportedError: a refused argument.
            EngineClosedError: the ServiceClient has been closed.
            CheckpointError: (through the future) missing, expired, torn, or made for another base model.
            ModelError: (through the future) the base model cannot be loaded.
        """
        check_retry_config(retry_config)
        refuse_options(record_stability_info=record_stability_info)
        if model_path is None and base_model is None:
            raise ConfigError("create_sampling_client needs model_path (saved weights) or base_model (the bare model)")
        if base_model is not None:
            check_text("base_model", base_model)

        def create() -> SamplingClient:
            if model_path is None:
                assert base_model is not None
                shared = self._bases.get(base_model)
                return SamplingClient(
                    Weights(shared.sampler.client(None, BASE_POLICY_VERSION), None), shared.base, self
                )
            info = read_checkpoint(self.store.resolve(model_path))
            shared = self._bases.get(base_model or info.base_model)
            adapter = load_adapter(info.path, shared.base)
            weights = Weights(shared.sampler.client(adapter, info.step), str(model_path))
            return SamplingClient(weights, shared.base, self)

        return self._submit(create, SamplingClientFuture)

    create_sampling_client_async = awaits(create_sampling_client)

    # -- the rest

    def get_server_capabilities(self) -> types.GetServerCapabilitiesResponse:
        """The builtin models that this machine can build, and those in memory. Any other directory or hub id works too.

        Raises:
            EngineClosedError: the ServiceClient has been closed.
        """
        self._check_open()
        return capabilities(self._bases.loaded())

    get_server_capabilities_async = answers(get_server_capabilities)

    def create_rest_client(self) -> RestClient:
        """A client that lists and deletes this store's checkpoints and training runs.

        Raises:
            EngineClosedError: the ServiceClient has been closed.
        """
        self._check_open()
        return RestClient(self)

    def list_checkpoints(self, training_run_id: types.ModelID | None = None) -> list[types.Checkpoint]:
        """The checkpoints of a training run, or of all of the store, newest first. *Extension* (Loops).

        Raises:
            CheckpointError: there is no such training run.
            EngineClosedError: the ServiceClient has been closed.
        """
        rest = self.create_rest_client()
        if training_run_id is not None:
            return rest.list_checkpoints(training_run_id).result().checkpoints[::-1]
        return rest.list_user_checkpoints(limit=sys.maxsize).result().checkpoints

    def get_checkpoint_archive_url(self, checkpoint: types.Checkpoint | str) -> CheckpointFilesResponse:
        """Where the files of a checkpoint are: ``file://`` URLs, one each. *Extension* (Loops).

        Args:
            checkpoint: one from ``list_checkpoints``, or a tinker:// path.

        Raises:
            CheckpointError: missing, torn or expired.
            EngineClosedError: the ServiceClient has been closed.
        """
        path = checkpoint.tinker_path if isinstance(checkpoint, types.Checkpoint) else checkpoint
        return self.create_rest_client().get_checkpoint_archive_url_from_tinker_path(path).result()

    def handle_of(self, base_model: str, model_path: str | None) -> SamplerHandle:
        """How another process opens the same weights."""
        return SamplerHandle(self.session_id, str(self.store.root), base_model, model_path, self._options)

    @property
    def closed(self) -> bool:
        """True after ``close``."""
        return self._closed

    def close(self, status: str = "success", detail: str | None = None) -> ResultFuture[None]:
        """Close all training clients, fail running samples, release the base models. Idempotent.

        ``status`` and ``detail`` are Tinker's; there is no session to mark with them, so they change nothing.

        Returns:
            a future that is done.
        """
        with self._lock:
            self._closed = True
            clients = list(self._clients.values())
        for client in clients:
            client.close()
        self._bases.close()
        self._executor.shutdown(wait=False)
        done: ResultFuture[None] = ResultFuture()
        done.future().set_result(None)
        return done

    copy_weights = refuses("ServiceClient", "copy_weights", "there are no projects; copy the checkpoint's directory")
    create_custom_loss = refuses(
        "ServiceClient", "create_custom_loss", "pass the Python function to forward_backward_custom"
    )
    get_console_url = refuses("ServiceClient", "get_console_url", "there is no console")
    get_telemetry = refuses("ServiceClient", "get_telemetry", "nothing is reported to anyone")

    def live_runs(self) -> list[RunRecord]:
        """The records of the training clients that are open."""
        with self._lock:
            return [client.record for client in self._clients.values()]

    def run_in_background(self, call: Callable[[], Any]) -> ResultFuture[Any]:
        """A future of what ``call`` returns, run in one of the service's threads.

        Raises:
            EngineClosedError: the ServiceClient has been closed.
        """
        return self._submit(call, ResultFuture)

    def _from_state(
        self, path: str, base_model: str | None, user_metadata: Any, token: str | None, *, with_optimizer: bool
    ) -> ClientFuture[TrainingClient]:
        refuse_options(weights_access_token=token)
        if base_model is not None:
            check_text("base_model", base_model)
        metadata, model_id = self._metadata(user_metadata), self._next_model_id()

        def create() -> TrainingClient:
            info = read_checkpoint(self.store.resolve(path))
            shared = self._bases.get(base_model or info.base_model)
            model = shared.train_checkpoint(info, with_optimizer=with_optimizer)
            return self._register(model_id, shared, model, metadata)

        return self._submit(create, TrainingClientFuture)

    def _register(
        self,
        model_id: str,
        shared: SharedBase,
        model: TrainableModel,
        metadata: dict[str, str],
        wandb: WandbConfig | None = None,
    ) -> TrainingClient:
        roles = linear_roles(shared.base.model)
        trained = {roles[name] for name in model.adapter.weights}
        record = RunRecord(
            model_id=model_id,
            base_model=shared.base.name,
            lora_rank=model.adapter.rank,
            train_attn="attn" in trained,
            train_mlp="mlp" in trained,
            train_unembed="unembed" in trained,
            user_metadata=metadata,
        )
        stream = None if wandb is None else WandbStream(wandb, asdict(record))
        client = TrainingClient(self, record, shared, model, stream)
        with self._lock:
            if not self._closed:
                self._clients[model_id] = client
                return client
        client.close()
        raise EngineClosedError("the ServiceClient was closed while the training client was being created")

    def _metadata(self, user_metadata: Any) -> dict[str, str]:
        return {**self._user_metadata, **check_metadata(user_metadata)}

    def _next_model_id(self) -> str:
        with self._lock:
            self._models += 1
            return f"{self.session_id}:train:{self._models - 1}"

    def _submit(self, call: Callable[[], Any], future_type: type[F]) -> F:
        with self._lock:
            if self._closed:
                raise _closed()
            return future_type(self._executor.submit(call))

    def _check_open(self) -> None:
        if self._closed:
            raise _closed()


_SERVICES: weakref.WeakValueDictionary[str, ServiceClient] = weakref.WeakValueDictionary()
"""The ServiceClients of this process by session id."""

_OPENED: dict[tuple[str, str], ServiceClient] = {}
"""Those that handles of other processes were opened with, by store and options: each base model is loaded once."""

_OPENING = Lock()


def open_sampler(handle: SamplerHandle) -> SamplingClient:
    """A client of the weights that a handle names, in the handle's ServiceClient or an equivalent one.

    Raises:
        CheckpointError: the weights are gone or have expired.
        ModelError: the base model cannot be loaded.
    """
    with _OPENING:
        key = (handle.store, json.dumps(handle.options, sort_keys=True))
        service = _SERVICES.get(handle.session_id) or _OPENED.get(key)
        if service is None or service.closed:
            service = _OPENED[key] = ServiceClient(store=handle.store, **handle.options)
    return service.create_sampling_client(handle.model_path, handle.base_model).result()


def _closed() -> EngineClosedError:
    return EngineClosedError("the ServiceClient has been closed; create a new one")


def capabilities(loaded: Iterable[BaseModel]) -> types.GetServerCapabilitiesResponse:
    """The builtin models and those in memory."""
    models = {
        name: SupportedModel(model_name=name, max_context_length=context_length, trainable=True, sampleable=True)
        for name, context_length in available_builtins().items()
    }
    models.update({base.name: _in_memory(base) for base in loaded})
    return types.GetServerCapabilitiesResponse(supported_models=list(models.values()))


def _in_memory(base: BaseModel) -> SupportedModel:
    return SupportedModel(
        model_name=base.name,
        max_context_length=base.context_length,
        trainable=True,
        sampleable=True,
        device=str(base.device),
        dtype=str(base.dtype).removeprefix("torch."),
    )
