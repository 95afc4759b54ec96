"""Trains one LoRA adapter: Tinker's TrainingClient over the engine in this process."""

from __future__ import annotations

import copy
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from tinker import types

from nat_plugin_evsys.clients.futures import ClientFuture, ForwardBackwardFuture, ResultFuture, after, failed
from nat_plugin_evsys.clients.handles import KEPT_SECONDS
from nat_plugin_evsys.clients.methods import answers, awaits, refuses, submits
from nat_plugin_evsys.clients.results import ForwardBackwardOutput, OptimStepOutput
from nat_plugin_evsys.clients.sampling import (
    SamplingClient,
    SamplingClientFuture,
    SamplingHost,
    SharedWeights,
    Weights,
)
from nat_plugin_evsys.clients.wandb_stream import WandbStream
from nat_plugin_evsys.engine.checkpoint_loading import load_checkpoint
from nat_plugin_evsys.engine.checkpoints import FrozenWeights, Kind
from nat_plugin_evsys.engine.gradient.custom_loss import CustomLoss, checked_loss
from nat_plugin_evsys.engine.gradient.operations import OperationFuture
from nat_plugin_evsys.engine.gradient.queue import ModelAction, TrainingQueue
from nat_plugin_evsys.engine.gradient.trainable import TrainableModel
from nat_plugin_evsys.engine.sampling.client import LocalSamplingClient
from nat_plugin_evsys.errors import ConfigError, DataError, EngineClosedError, EvsysError
from nat_plugin_evsys.runtime.arguments import (
    check_data,
    check_flag,
    check_loss_fn,
    check_loss_fn_config,
    check_metadata,
    check_retry_config,
    check_ttl,
    refuse_options,
)
from nat_plugin_evsys.runtime.bases import SharedBase
from nat_plugin_evsys.runtime.checkpoint_store import CheckpointStore
from nat_plugin_evsys.runtime.extensions import ModelData
from nat_plugin_evsys.runtime.runs import RunRecord

if TYPE_CHECKING:
    import tinker
    from tinker.lib.retry_handler import RetryConfig

F = TypeVar("F", bound=OperationFuture[Any])


class TrainingHost(SamplingHost, Protocol):
    """What a TrainingClient needs from the ServiceClient that made it."""

    store: CheckpointStore

    def create_sampling_client(
        self, model_path: str, base_model: str, retry_config: RetryConfig | None, record_stability_info: bool
    ) -> ClientFuture[SamplingClient]:
        """A future of a client that samples from saved weights."""


class TrainingClient:
    """One adapter under training. Get one from a ServiceClient.

    Every call submits at once and returns a future (``.result(timeout)``, or ``await``); invalid arguments
    are raised through the future too. Operations of one client run in submission order in a thread of its
    own; those of several clients run side by side. A failed operation fails its own future and changes nothing.
    A call on a closed client raises EngineClosedError at once. With ``wait=True`` (*extension*, Weaver) a call returns
    only when it is done, and raises its error itself. Safe to use from several threads and event loops at once.

    Attributes:
        model_id: ``<session_id>:train:<n>``.
    """

    def __init__(
        self,
        service: TrainingHost,
        record: RunRecord,
        shared: SharedBase,
        model: TrainableModel,
        wandb: WandbStream | None = None,
    ) -> None:
        self.model_id = record.model_id
        self.record = record
        self._service = service
        self._store = service.store
        self._shared = shared
        self._model = weakref.ref(model)
        self._queue = TrainingQueue(model)
        self._inflight: SharedWeights | None = None
        self._wandb = wandb
        self._tokenizer: Any = None
        self._tokenizer_lock = threading.Lock()
        # A client that nobody refers to any more, and that has nothing left to do, takes its thread and model along.
        weakref.finalize(self, self._queue.close, 0.0).atexit = False
        if wandb is not None:
            weakref.finalize(self, wandb.close)

    @property
    def policy_version(self) -> int:
        """Optimizer steps that made the current weights, as a sampling client made now would report. *Extension*.

        Raises:
            EngineClosedError: the client has been closed.
        """
        model = self._model()
        if model is None or self._queue.closed:
            raise EngineClosedError("the training client has been closed; create a new one")
        return model.step

    @property
    def progress(self) -> tuple[int, int]:
        """``(done tokens, total tokens)`` of the operation that runs or ran last. *Extension.*"""
        return self._queue.progress

    # -- losses

    def forward(
        self,
        data: list[tinker.Datum] | None = None,
        loss_fn: types.LossFnType | None = None,
        loss_fn_config: Mapping[str, float | str] | None = None,
        *,
        datums: list[tinker.Datum] | None = None,
        wait: bool = False,
    ) -> ForwardBackwardFuture:
        """Loss, logprobs and metrics of ``data`` without a gradient; see ``forward_backward``."""
        return self._loss(TrainableModel.forward, data, datums, loss_fn, loss_fn_config, wait)

    forward_async = submits(forward)

    def forward_backward(
        self,
        data: list[tinker.Datum] | None = None,
        loss_fn: types.LossFnType | None = None,
        loss_fn_config: Mapping[str, float | str] | None = None,
        *,
        datums: list[tinker.Datum] | None = None,
        wait: bool = False,
    ) -> ForwardBackwardFuture:
        """Loss of ``data``, a *sum* over its tokens, and its gradient, which accumulates until ``optim_step``.

        Args:
            data: ``types.Datum`` each, at least one; lengths may differ.
            loss_fn: ``cross_entropy``, ``importance_sampling``, ``ppo``, ``cispo``, ``dro`` or ``gspo``; formulas,
                inputs and config keys are in ``engine.gradient.losses``.
            loss_fn_config: the loss function's options.
            datums: Weaver's name for ``data``.
            wait: return only when it is done, raising its error.

        Returns:
            a future of ``types.ForwardBackwardOutput``: per Datum ``logprobs`` and ``elementwise_loss`` in the shape of
            its target_tokens; ``metrics`` with ``loss:sum`` and more; ``loss``.

        Raises, through the future:
            DataError: ``data`` or ``loss_fn`` is malformed (before any compute).
            ConfigError: ``loss_fn_config`` is wrong (before any compute).
        """
        return self._loss(TrainableModel.forward_backward, data, datums, loss_fn, loss_fn_config, wait)

    forward_backward_async = submits(forward_backward)

    def forward_backward_custom(
        self, data: list[tinker.Datum], loss_fn: CustomLoss, *, loss_type_input: None = None, wait: bool = False
    ) -> ForwardBackwardFuture:
        """``forward_backward`` with ``loss_fn(data, logprobs) -> (loss, metrics)``, which runs in the client's thread.

        The gradient is exact (Tinker's two passes: logprobs, then cross_entropy weighted with -dC/dlogprobs). The
        metrics are the loss's own, ``loss:sum`` and ``surrogate_loss:sum``.

        Raises, through the future:
            DataError: ``data`` is malformed, or the loss returned the wrong thing.
            UnsupportedError: loss_type_input was given.
            whatever ``loss_fn`` raised.
        """

        def prepare() -> ModelAction:
            refuse_options(loss_type_input=loss_type_input)
            rows, loss = check_data(data), checked_loss(loss_fn)

            def run(model: TrainableModel, progress: Any) -> ForwardBackwardOutput:
                output = ForwardBackwardOutput.of(model.forward_backward_custom(rows, loss, progress))
                self._stream("forward_backward", output.metrics, model.step)
                return output

            return run

        return self._submit(prepare, ForwardBackwardFuture(), wait)

    forward_backward_custom_async = submits(forward_backward_custom)

    def optim_step(
        self,
        optim_params: types.OptimParams | None = None,
        *,
        adam_params: types.AdamParams | None = None,
        wait: bool = False,
    ) -> ResultFuture[OptimStepOutput]:
        """One AdamW step (== ``torch.optim.AdamW``) on the accumulated gradient, which it then clears.

        Args:
            optim_params: ``types.AdamParams``: the learning rate and the other values of this step.
            adam_params: the same under its older name.
            wait: return only when it is done, raising its error.

        Returns:
            a future of ``types.OptimStepResponse`` with metrics ``grad_norm`` (before clipping), ``clip_coefficient``,
            ``learning_rate`` and ``step``.

        Raises, through the future:
            ConfigError: no AdamParams, both names used, or a value out of range; the gradient stays.
            DataError: no gradient has accumulated.
            NonFiniteGradientError: weights and moments are as they were, the gradient is cleared.
        """

        def prepare() -> ModelAction:
            if optim_params is not None and adam_params is not None:
                raise ConfigError("optim_step takes optim_params or, as its older name, adam_params; not both")
            given: Any = optim_params if optim_params is not None else adam_params
            if not isinstance(given, types.AdamParams):
                raise ConfigError(
                    f"optim_step takes tinker.AdamParams, got {type(given).__name__}; AdamW is the only optimizer"
                )
            adam = given.model_copy()

            def run(model: TrainableModel, _: Any) -> OptimStepOutput:
                output = OptimStepOutput.of(model.optim_step(adam))
                self._stream("optim_step", output.metrics, model.step)
                return output

            return run

        return self._submit(prepare, ResultFuture(), wait)

    optim_step_async = submits(optim_step)

    # -- checkpoints

    def save_state(
        self,
        name: str,
        ttl_seconds: int | None = None,
        overwrite: bool = False,
        user_metadata: dict[str, str] | None = None,
        *,
        wait: bool = False,
    ) -> ResultFuture[types.SaveWeightsResponse]:
        """Save weights and optimizer state, atomically, as ``tinker://<model_id>/weights/<name>``.

        Args:
            name: letters, digits and ``. _ = + -``.
            ttl_seconds: lifetime, from one hour to ten years; None never expires.
            overwrite: replace an existing one of that name, with its metadata and expiry.
            user_metadata: from strings to strings.
            wait: return only when it is done, raising its error.

        Raises, through the future:
            CheckpointError: the name is refused or taken, or the disk refused the write.
            ConfigError: ttl_seconds or user_metadata is malformed.
        """

        respond = partial(types.SaveWeightsResponse, type="save_weights")
        return self._save("training", name, respond, wait, ttl_seconds, overwrite, user_metadata)

    save_state_async = submits(save_state)

    def save_weights_for_sampler(
        self,
        name: str,
        ttl_seconds: int | None = None,
        user_metadata: dict[str, str] | None = None,
        *,
        overwrite: bool = False,
        wait: bool = False,
    ) -> ResultFuture[types.SaveWeightsForSamplerResponse]:
        """Save the weights, atomically, as ``tinker://<model_id>/sampler_weights/<name>``, a PEFT directory.

        Arguments and errors are those of ``save_state``; ``overwrite`` is an *extension*.
        """

        respond = partial(types.SaveWeightsForSamplerResponse, type="save_weights_for_sampler")
        return self._save("sampler", name, respond, wait, ttl_seconds, overwrite, user_metadata)

    save_weights_for_sampler_async = submits(save_weights_for_sampler)

    def save_weights_external(
        self,
        name: str,
        ttl_seconds: int | None = None,
        age_encryption_recipients: None = None,
        *,
        wait: bool = False,
    ) -> ResultFuture[types.SaveWeightsExternalResponse]:
        """Save the weights as ``tinker://<model_id>/external_weights/<name>``; RestClient gives the files' URLs.

        Arguments and errors are those of ``save_state``; ``age_encryption_recipients`` is refused.
        """

        refused = {"age_encryption_recipients": age_encryption_recipients}
        return self._save("external", name, types.SaveWeightsExternalResponse, wait, ttl_seconds, refused=refused)

    save_weights_external_async = submits(save_weights_external)

    def load_state(
        self, path: str, weights_access_token: str | None = None, *, wait: bool = False
    ) -> ResultFuture[types.LoadWeightsResponse]:
        """Replace the weights by a checkpoint's; the optimizer starts afresh and the gradient is cleared.

        It may be called at any time (Tinker: as the first call only).

        Args:
            path: ``tinker://…`` of this store, or a checkpoint's directory.
            weights_access_token: refused.
            wait: return only when it is done, raising its error.

        Raises, through the future:
            CheckpointError: missing, expired, torn, or made for another base model or LoRA shape. Nothing has changed.
        """
        return self._load(path, weights_access_token, False, wait)

    load_state_async = submits(load_state)

    def load_state_with_optimizer(
        self, path: str, weights_access_token: str | None = None, *, wait: bool = False
    ) -> ResultFuture[types.LoadWeightsResponse]:
        """``load_state`` with the optimizer's moments: training continues bit for bit (on the CPU)."""
        return self._load(path, weights_access_token, True, wait)

    load_state_with_optimizer_async = submits(load_state_with_optimizer)

    # -- sampling

    def create_sampling_client(
        self, model_path: str, retry_config: RetryConfig | None = None, record_stability_info: bool = False
    ) -> ClientFuture[SamplingClient]:
        """A client of saved weights over this client's base model; see ``ServiceClient.create_sampling_client``."""
        return self._service.create_sampling_client(
            model_path, self._shared.base.name, retry_config, record_stability_info
        )

    create_sampling_client_async = awaits(create_sampling_client)

    def save_weights_and_get_sampling_client(
        self,
        name: str | None = None,
        retry_config: RetryConfig | None = None,
        record_stability_info: bool = False,
        kind: types.SamplingClientKind = "snapshot",
    ) -> ClientFuture[SamplingClient]:
        """Freeze the weights as they are after the operations submitted so far; returns a future of a client of them.

        The snapshot is in memory and goes with the client. With ``name`` the weights are also saved as by
        ``save_weights_for_sampler``, replacing any of that name. The future may be used as the client itself.

        With ``kind="inflight"`` the weights also become those of every inflight client made before: what these sample
        from then on is of the new version. No sequence mixes two versions.

        Raises, through the future:
            UnsupportedError: record_stability_info.
            ConfigError: another kind.
            CheckpointError: the name is refused, or the disk refused the write.
        """

        def prepare() -> ModelAction:
            check_retry_config(retry_config)
            refuse_options(record_stability_info=record_stability_info)
            if kind not in ("snapshot", "inflight"):
                raise ConfigError(f"kind must be 'snapshot' or 'inflight', got {kind!r}")
            return lambda model, _: self._publish(model, name, kind == "inflight")

        return self._submit(prepare, SamplingClientFuture(), False)

    save_weights_and_get_sampling_client_async = awaits(save_weights_and_get_sampling_client)

    # -- facts

    def get_info(self) -> types.GetInfoResponse:
        """The model's id, base model and LoRA rank. Returns at once."""
        base, rank = self._shared.base, self.record.lora_rank
        data = ModelData(
            arch=base.model.config.model_type,
            model_name=base.name,
            tokenizer_id=getattr(base.tokenizer, "name_or_path", None) or base.name,
            model_id=self.model_id,
            lora_rank=rank,
        )
        return types.GetInfoResponse(
            type="get_info",
            model_data=data,
            model_id=self.model_id,
            is_lora=True,
            lora_rank=rank,
            model_name=base.name,
        )

    get_info_async = answers(get_info)

    def get_tokenizer(self) -> Any:
        """The base model's Hugging Face tokenizer: a copy, so that its settings are this client's own."""
        with self._tokenizer_lock:
            if self._tokenizer is None:
                self._tokenizer = copy.deepcopy(self._shared.base.tokenizer)
            return self._tokenizer

    def close(self) -> None:
        """Stop at the next micro-batch, fail what is queued with EngineClosedError, free the adapter. *Extension.*

        Its checkpoints, and sampling clients made from it, live on.
        """
        self._queue.close()
        if self._wandb is not None:
            self._wandb.close()

    get_console_url = refuses("TrainingClient", "get_console_url", "there is no console")
    get_telemetry = refuses("TrainingClient", "get_telemetry", "nothing is reported to anyone")

    def _loss(
        self,
        method: Callable[..., types.ForwardBackwardOutput],
        data: Any,
        datums: Any,
        loss_fn: Any,
        config: Any,
        wait: bool,
    ) -> ForwardBackwardFuture:
        def prepare() -> ModelAction:
            if data is not None and datums is not None:
                raise DataError("data and datums are two names of the same list; give one of them")
            rows = check_data(data if datums is None else datums)
            name, options = check_loss_fn(loss_fn), check_loss_fn_config(config)

            def run(model: TrainableModel, progress: Any) -> ForwardBackwardOutput:
                output = ForwardBackwardOutput.of(method(model, rows, name, options, progress))
                self._stream(method.__name__, output.metrics, model.step)
                return output

            return run

        return self._submit(prepare, ForwardBackwardFuture(), wait)

    def _stream(self, operation: str, metrics: Mapping[str, float] | None, step: int) -> None:
        if self._wandb is not None and operation != "forward":
            self._wandb.log(operation, metrics, step)

    def _publish(self, model: TrainableModel, name: str | None, inflight: bool) -> SamplingClient:
        base, store, record = self._shared.base, self._store, self.record
        options: dict[str, Any] = {"kind": "sampler", "user_metadata": {}}

        def keep(engine: LocalSamplingClient) -> str:
            assert engine.adapter is not None
            frozen = FrozenWeights(base, engine.adapter, engine.policy_version)
            kept = f"kept-{engine.policy_version}-{uuid.uuid4().hex[:8]}"
            return store.save(record, frozen, kept, overwrite=False, ttl_seconds=KEPT_SECONDS, **options)

        path = None if name is None else store.save(record, model, name, overwrite=True, ttl_seconds=None, **options)
        weights = Weights(self._shared.sampler.client(model.adapter, model.step), path, keep)
        if not inflight:
            return SamplingClient(weights, base, self._service)
        if self._inflight is None:
            self._inflight = SharedWeights(weights)
        self._inflight.current = weights
        return SamplingClient(self._inflight, base, self._service)

    def _save(
        self,
        kind: Kind,
        name: str,
        respond: Callable[..., Any],
        wait: bool,
        ttl: Any,
        overwrite: Any = False,
        metadata: Any = None,
        refused: Mapping[str, Any] | None = None,
    ) -> ResultFuture[Any]:
        def prepare() -> ModelAction:
            refuse_options(**(refused or {}))
            options: dict[str, Any] = {
                "overwrite": check_flag("overwrite", overwrite),
                "ttl_seconds": check_ttl(ttl),
                "user_metadata": check_metadata(metadata),
            }
            return lambda model, _: respond(path=self._store.save(self.record, model, name, kind=kind, **options))

        return self._submit(prepare, ResultFuture(), wait)

    def _load(
        self, path: str, weights_access_token: str | None, with_optimizer: bool, wait: bool
    ) -> ResultFuture[types.LoadWeightsResponse]:
        def load(model: TrainableModel, _: Any) -> types.LoadWeightsResponse:
            load_checkpoint(self._store.resolve(path), model, with_optimizer=with_optimizer)
            return types.LoadWeightsResponse(path=str(path), model_id=self.model_id, type="load_weights")

        def prepare() -> ModelAction:
            refuse_options(weights_access_token=weights_access_token)
            return load

        return self._submit(prepare, ResultFuture(), wait)

    def _submit(self, prepare: Callable[[], ModelAction], future: F, wait: bool) -> F:
        """Check the arguments, then queue the operation."""
        if self._queue.closed:
            raise EngineClosedError(f"the training client {self.model_id} has been closed; create a new one")
        try:
            operation = prepare()
        except EvsysError as error:
            return after(failed(future, error), wait)

        def run(model: TrainableModel, progress: Any) -> Any:
            # Referring to self, a queued operation keeps its client from being collected.
            self.record.last_request_at = time.time()
            return operation(model, progress)

        return after(self._queue.submit(run, future), wait)


class TrainingClientFuture(ClientFuture[TrainingClient]):
    """A future of a TrainingClient that may be used as one."""

    KIND = TrainingClient
