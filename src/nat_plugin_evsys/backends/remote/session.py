"""One session on a Tinker service: the SDK's clients, and operations handed to them in order."""

from __future__ import annotations

import asyncio
import functools
import logging
import re
from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from nat_plugin_evsys.backends.remote.errors import Purpose
from nat_plugin_evsys.backends.remote.service import TinkerService
from nat_plugin_evsys.backends.remote.waiting import ServiceWatch, in_thread, sdk_future
from nat_plugin_evsys.engine.gradient.operations import OperationFuture, OperationQueue
from nat_plugin_evsys.errors import CheckpointError, EngineClosedError

if TYPE_CHECKING:
    import tinker

logger = logging.getLogger(__name__)

T = TypeVar("T")

_SHORT_URI = re.compile(r"^(tinker://[^/]+)/([^/]+)$")
_URI = re.compile(r"tinker://[^/]+/(weights|sampler_weights)/[^/]+")

CLOSE_SECONDS = 15.0
"""Seconds that the end of the session may take; a service that is gone ends it on its own."""


class ServiceOperation(Generic[T]):
    """An operation that has been submitted; ``await`` it in any event loop. Cancelling only stops the waiting.

    Args:
        submitted: gives the SDK's future once the operation has been handed to it.
    """

    def __init__(self, watch: ServiceWatch, submitted: Future[Future[T]], what: str, purpose: Purpose) -> None:
        self._watch = watch
        self._submitted = submitted
        self._what = what
        self._purpose = purpose

    def __await__(self) -> Generator[Any, None, T]:
        return self._wait().__await__()

    async def result_async(self) -> T:
        """The result, as by ``await``."""
        return await self

    async def _wait(self) -> T:
        future = await self._watch.wait(self._submitted, self._what, self._purpose)
        result = await self._watch.wait(future, self._what, self._purpose)
        if self._purpose == "data":
            add_missing_loss(result)
        return result


class TinkerSession:
    """The SDK's ``ServiceClient`` with a training client and one that is never trained, each made at its first use.

    Everything goes to the SDK in order, from the session's own thread: the SDK's calls that create clients block, and
    its operation numbers must be taken in order.

    Attributes:
        watch: waits for the service's results.
        training_client: the SDK's, or None before its first use.
    """

    def __init__(
        self, watch: ServiceWatch, client: tinker.ServiceClient, base_model: str, lora: dict[str, Any]
    ) -> None:
        self.watch = watch
        self.base_model = base_model
        self.training_client: Any = None
        self._untrained_client: Any = None
        self._client = client
        self._lora = lora
        self._queue = OperationQueue("evsys-tinker")

    @classmethod
    async def open(cls, service: TinkerService, base_model: str, lora: dict[str, Any]) -> TinkerSession:
        """Start a session.

        Args:
            lora: rank, seed, train_attn, train_mlp and train_unembed of the adapter.

        Raises:
            ServiceUnavailableError, ServiceError, ConfigError: the service does not answer, or refuses.
        """
        import tinker

        watch = ServiceWatch(service)
        opening = in_thread(lambda: tinker.ServiceClient(base_url=service.url, api_key=service.key), "evsys-session")
        return cls(watch, await watch.wait(opening, "opening a session", "start"), base_model, lora)

    @property
    def closed(self) -> bool:
        """True after ``close`` was called."""
        return self._queue.closed

    def train(self, what: str, purpose: Purpose, call: Callable[[Any], Any]) -> ServiceOperation[Any]:
        """Hand ``call(training client)`` to the SDK after everything that came before.

        Raises:
            EngineClosedError: the session has been closed.
        """
        return self._enqueue(what, purpose, lambda: sdk_future(call(self._open_training_client())))

    def untrained(self, what: str, purpose: Purpose, call: Callable[[Any], Any]) -> ServiceOperation[Any]:
        """``train`` on an adapter of its own. ``call`` must not train it: it stands for the bare base model."""
        return self._enqueue(what, purpose, lambda: sdk_future(call(self._open_untrained_client())))

    def load(self, path: str, *, with_optimizer: bool) -> ServiceOperation[None]:
        """Replace the training client by one that starts from a checkpoint: a new training run of the service.

        The operation fails with a CheckpointError when the checkpoint is gone, or another model's or rank's.
        """

        def replace() -> Future[None]:
            self.training_client = self._load_training_client(path, with_optimizer=with_optimizer)
            return sdk_future(None)

        return self._enqueue(f"loading {path}", "checkpoint", replace)

    async def open_sampler(self, path: str | None) -> Any:
        """The SDK's sampling client of a checkpoint, or of the base model.

        A checkpoint with optimizer state is first loaded for training, into its own adapter.

        Raises:
            CheckpointError: the checkpoint is gone or another model's.
        """
        if path is not None and not _is_sampler_path(path):
            return await self._enqueue(f"opening {path} for sampling", "checkpoint", lambda: self._publish_state(path))
        if path is None:
            what = f"opening {self.base_model} for sampling"
            make = functools.partial(self._client.create_sampling_client, base_model=self.base_model)
        else:
            what = f"opening {path} for sampling"
            make = functools.partial(self._client.create_sampling_client, model_path=path)
        opening = in_thread(lambda: sdk_future(make()).result(), "evsys-sampler")
        client = await self.watch.wait(opening, what, "start" if path is None else "checkpoint")
        if path is not None and client.get_base_model() != self.base_model:
            raise CheckpointError(_other_model(path, client.get_base_model(), self.base_model))
        return client

    async def close(self) -> None:
        """Finish the session. The service handles what it has queued; checkpoints stay."""
        if self.closed:
            return
        await asyncio.to_thread(self._queue.close, CLOSE_SECONDS)
        if not hasattr(self._client, "close"):
            return  # a client of older releases of the SDK: its session expires
        finishing = in_thread(lambda: self._client.close("success").result(), "evsys-finish")
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await asyncio.shield(asyncio.wrap_future(finishing))
        except Exception as error:  # noqa: BLE001 - nothing depends on it: a session that is not finished expires
            logger.info("the session at %s was not finished (%r); it will expire", self.watch.service.url, error)

    def _enqueue(self, what: str, purpose: Purpose, submit: Callable[[], Future[Any]]) -> ServiceOperation[Any]:
        future: OperationFuture[Future[Any]] = OperationFuture()
        try:
            self._queue.submit(lambda _: submit(), future)
        except EngineClosedError:
            raise EngineClosedError(f"{what}: the session at {self.watch.service.url} has been closed") from None
        return ServiceOperation(self.watch, future.future(), what, purpose)

    def _open_training_client(self) -> Any:
        """Runs in the session's thread."""
        if self.training_client is None:
            self.training_client = self._new_training_client()
        return self.training_client

    def _open_untrained_client(self) -> Any:
        """Runs in the session's thread."""
        if self._untrained_client is None:
            self._untrained_client = self._new_training_client()
        return self._untrained_client

    def _new_training_client(self) -> Any:
        """Runs in the session's thread."""
        return sdk_future(self._client.create_lora_training_client(self.base_model, **self._lora)).result()

    def _load_training_client(self, path: str, *, with_optimizer: bool) -> Any:
        """Runs in the session's thread."""
        if with_optimizer:
            made = self._client.create_training_client_from_state_with_optimizer(path)
        else:
            made = self._client.create_training_client_from_state(path)
        loaded = sdk_future(made).result()
        self._check_fits(path, loaded.get_info())
        return loaded

    def _publish_state(self, path: str) -> Future[Any]:
        """Runs in the session's thread."""
        loaded = self._load_training_client(path, with_optimizer=False)
        return sdk_future(loaded.save_weights_and_get_sampling_client())

    def _check_fits(self, path: str, info: Any) -> None:
        model = info.model_data.model_name
        if model is not None and model != self.base_model:
            raise CheckpointError(_other_model(path, model, self.base_model))
        if info.lora_rank is not None and info.lora_rank != self._lora["rank"]:
            raise CheckpointError(
                f"{path} has lora_rank {info.lora_rank}, not {self._lora['rank']}; set lora_rank to it"
            )


def _other_model(path: str, its_model: str, base_model: str) -> str:
    return f"{path} is of base model `{its_model}`, not `{base_model}`; set base_model to it"


def add_missing_loss(output: Any) -> None:
    """Add ``loss:sum`` if a service omits it but gives each token's loss, as SkyRL's does."""
    outputs = output.loss_fn_outputs
    if outputs and "loss:sum" not in output.metrics and all("elementwise_loss" in each for each in outputs):
        output.metrics["loss:sum"] = float(sum(sum(each["elementwise_loss"].tolist()) for each in outputs))


def _is_sampler_path(path: str) -> bool:
    return "/sampler_weights/" in path


def sampler_uri(path: str) -> str:
    """The full path of saved sampler weights. SkyRL answers tinker://<run>/<name> and accepts both forms."""
    return _SHORT_URI.sub(r"\1/sampler_weights/\2", path)


def checked_uri(path: str) -> str:
    """``path``, which must be a checkpoint of a service that can be loaded.

    Raises:
        CheckpointError: it is something else.
    """
    if not _URI.fullmatch(path):
        raise CheckpointError(
            f"{path} is not a service's checkpoint (tinker://<run>/weights/<name>); unset base_url to use a local one"
        )
    return path
